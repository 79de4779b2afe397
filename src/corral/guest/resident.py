"""Speaking with corral-guest, the resident agent: one connection, many programs at once.

The hello: QEMU hands bytes to the guest only while the agent has its port open, so the first hello simply waits in
the socket, and the agent announces itself when it opens the port: nobody polls a booting guest. A hello that was taken
but not answered is repeated, and then once behind as many zeros as complete any frame that an earlier connection left
half sent. All that the guest sends is untrusted: see :meth:`Resident._dispatch`. Programs: :mod:`corral.guest.process`.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from pathlib import Path

from corral.errors import CorralError, Refused, Unavailable
from corral.guest.frames import (
    HEADER,
    MARK,
    MAX_PAYLOAD,
    NONCE_SIZE,
    PROTOCOL,
    Decoder,
    Field,
    Frame,
    Type,
    decode_fields,
    encode,
    encode_fields,
    violation,
)
from corral.guest.process import START_TIMEOUT_S, ResidentProcess
from corral.guest.protocol import Command, GuestInfo, Identity, Process
from corral.runtime import Runtime
from corral.runtime.sockets import reachable

MAX_PROGRAMS = 64
"""As many as the agent has channels."""
MAX_QUEUED = 16 << 20
"""Bytes waiting for QEMU to take them: more means a guest that has stood still for long."""
MAX_UNEXPECTED = 1000
"""Frames nobody waits for: late answers are normal, a flood is not."""
MAX_TEXT, MAX_ADDRESSES = 256, 64
HELLO_AGAIN_S = 0.25
PAD_AT = 3
"""Which repetition of the hello goes behind a pad: the first ones may just have met a slow guest."""


def unresponsive(message: str) -> Unavailable:
    """The error for a guest that does not answer."""
    return Unavailable(message, code="unresponsive")


def all_taken(writer: asyncio.StreamWriter) -> bool:
    """Has QEMU read everything we sent? It does only while the guest has the port open."""
    transport = writer.transport
    if transport.is_closing() or transport.get_write_buffer_size():
        return False
    waiting = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return not any(waiting)


async def open_resident(path: Path, rt: Runtime, *, timeout: float = 5.0) -> Resident:
    """Connect to the chardev socket ``path`` and wait until the agent answers.

    Raises Unavailable ``unresponsive`` when nobody answers in ``timeout`` seconds or there is no such socket.
    """
    try:
        async with asyncio.timeout(timeout):
            with reachable(path) as name:
                reader, writer = await asyncio.open_unix_connection(name)
            resident = Resident(reader, writer, rt)
            try:
                await resident.greet()
            except BaseException:
                await resident.close()
                raise
            return resident
    except TimeoutError as error:
        raise unresponsive(f"the guest's agent did not answer within {timeout:g} s") from error
    except OSError as error:
        raise unresponsive(f"the guest's channel cannot be opened: {error.strerror or error}") from error


class Resident:
    """Implements :class:`corral.guest.protocol.Guest`. Made by :func:`open_resident`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rt: Runtime) -> None:
        self._reader, self._writer, self._rt = reader, writer, rt
        self._nonce = rt.random.token(NONCE_SIZE)
        self._decoder = Decoder()
        self._last = 0  # channel numbers are never used twice
        self._unexpected = 0
        self._instance = b""  # which start of the agent has answered
        self._greeted = asyncio.Event()
        self._replies: dict[int, asyncio.Future[Frame]] = {}
        self._programs: dict[int, ResidentProcess] = {}
        self._lost: CorralError | None = None
        self._reading = asyncio.create_task(self._read(), name="guest-reader")

    @property
    def lost(self) -> CorralError | None:
        """Why this connection is no longer of use; None: it is."""
        return self._lost

    async def greet(self) -> None:
        """Say hello until it is answered (bound it with a timeout)."""
        tries = 0
        while not self._greeted.is_set():
            if tries == 0 or all_taken(self._writer):
                tries += 1
                self._hello(padded=tries == PAD_AT)
            try:
                async with asyncio.timeout(HELLO_AGAIN_S):
                    await self._greeted.wait()
            except TimeoutError:
                continue
        if self._lost:
            raise self._lost

    def _hello(self, *, padded: bool = False) -> None:
        pad = b""
        if padded:
            # An agent that only now answers what was said before gives up at this: its answer is no longer ours.
            pad, self._nonce = bytes(HEADER.size + MAX_PAYLOAD), self._rt.random.token(NONCE_SIZE)
        self._writer.write(pad + MARK + encode(Type.HELLO, 0, self._nonce + struct.pack("<H", PROTOCOL)))

    # What arrives.

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(1 << 18):
                self._decoder.feed(data)
                for frame in self._decoder:
                    self._dispatch(frame)
            self._lose(unresponsive("the guest's channel was closed"))
        except CorralError as error:
            self._lose(error)
        except OSError as error:
            self._lose(unresponsive(f"the guest's channel failed: {error.strerror or error}"))

    def _dispatch(self, frame: Frame) -> None:
        """Every frame is either one that somebody waits for, within its credit, or is counted."""
        if not self._greeted.is_set() or frame.type in (Type.WELCOME, Type.ANNOUNCE, Type.VIOLATION):
            self._dispatch_greeting(frame)
        elif program := self._programs.get(frame.channel):
            if program.handle(frame):
                del self._programs[frame.channel]
        elif frame.type in (Type.REPLY, Type.REFUSED) and frame.channel in self._replies:
            reply = self._replies.pop(frame.channel)
            if not reply.done():
                reply.set_result(frame)
        else:
            self._count_unexpected()

    def _dispatch_greeting(self, frame: Frame) -> None:
        if frame.type == Type.WELCOME and frame.payload[:NONCE_SIZE] == self._nonce:
            instance = frame.payload[NONCE_SIZE : 2 * NONCE_SIZE]
            if self._instance and instance != self._instance:
                raise unresponsive("the guest's agent was started again")
            self._instance = instance
            self._decoder.settle()
            self._greeted.set()
        elif frame.type == Type.ANNOUNCE and not self._greeted.is_set():
            self._hello()
        elif frame.type == Type.ANNOUNCE and frame.payload != self._instance:
            raise unresponsive("the guest's agent was started again")
        elif frame.type == Type.VIOLATION and self._greeted.is_set():
            raise CorralError(f"the guest's agent gave up: {clean_text(frame.payload)}", code="guest")
        self._count_unexpected()

    def _count_unexpected(self) -> None:
        self._unexpected += 1
        if self._unexpected > MAX_UNEXPECTED:
            raise violation("a flood of frames nobody asked for")

    def _lose(self, error: CorralError) -> None:
        if self._lost:
            return
        self._lost = error
        self._writer.transport.abort()
        self._greeted.set()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
        self._replies.clear()
        for program in self._programs.values():
            program.fail(error)
        self._programs.clear()

    # What is sent.

    def send(self, type_: Type, channel: int, payload: bytes = b"") -> None:
        """Queue a frame. Raises what :attr:`lost` says, or ``unresponsive`` when too much is queued already."""
        if not self._lost and self._writer.transport.get_write_buffer_size() > MAX_QUEUED:
            self._lose(unresponsive("the guest has stopped taking data"))
        if self._lost:
            raise self._lost
        self._writer.write(encode(type_, channel, payload))

    def _channel(self) -> int:
        self._last += 1
        if self._last > 0xFFFFFFFF:
            raise unresponsive("this connection is worn out: connect again")
        return self._last

    async def _ask(self, type_: Type, payload: bytes, timeout: float, what: str) -> bytes:
        channel = self._channel()
        reply: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._replies[channel] = reply
        try:
            async with asyncio.timeout(timeout):
                self.send(type_, channel, payload)
                frame = await reply
        except TimeoutError as error:
            raise unresponsive(f"the guest did not answer to {what} within {timeout:g} s") from error
        finally:
            self._replies.pop(channel, None)
        if frame.type == Type.REFUSED:
            raise CorralError(f"the guest failed at {what}: {clean_text(frame.payload, 4096)}", code="guest")
        return frame.payload

    # corral.guest.protocol.Guest

    async def ping(self, timeout: float = 2.0) -> None:
        await self._ask(Type.PING, b"", timeout, "a ping")

    async def info(self, timeout: float = 5.0) -> GuestInfo:
        single: dict[int, str] = {}
        addresses: list[str] = []
        ready = True
        for tag, data in decode_fields(await self._ask(Type.INFO, b"", timeout, "a question about itself")):
            if tag == Field.ADDRESS and len(addresses) < MAX_ADDRESSES:
                addresses.append(clean_text(data))
            elif tag == Field.READY:
                ready = data == b"\x01"
            else:
                single[tag] = clean_text(data)
        return GuestInfo(
            agent="corral-guest",
            version=single.get(Field.VERSION, ""),
            hostname=single.get(Field.HOSTNAME, ""),
            os=single.get(Field.OS, ""),
            kernel=single.get(Field.KERNEL, ""),
            boot_id=single.get(Field.BOOT_ID, ""),
            addresses=tuple(addresses),
            ready=ready,
        )

    async def run(self, command: Command) -> Process:
        payload = _bounded(_command_fields(command), "the command with its environment")
        if len(self._programs) >= MAX_PROGRAMS:
            raise Unavailable(f"{MAX_PROGRAMS} programs run in this guest already", code="busy")
        channel = self._channel()
        program = ResidentProcess(self, channel)
        self.send(Type.EXEC, channel, payload)
        self._programs[channel] = program
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await program.started()
        except TimeoutError as error:
            await program.close()
            raise unresponsive(f"the guest did not start the program within {START_TIMEOUT_S:g} s") from error
        except asyncio.CancelledError:
            if not self._lost:
                self.send(Type.CLOSE, channel)
            raise
        return program

    async def identify(self, identity: Identity, timeout: float = 5.0) -> None:
        payload = _bounded(_identity_fields(identity), "the identity")
        await self._ask(Type.IDENTITY, payload, timeout, "taking its identity")

    async def shutdown(self, *, reboot: bool = False, timeout: float = 5.0) -> None:
        await self._ask(Type.SHUTDOWN, bytes([reboot]), timeout, "going down")

    async def close(self) -> None:
        """Give the channel up; the agent then kills the programs of this connection."""
        self._lose(unresponsive("the connection to the guest was closed"))
        self._reading.cancel()
        await asyncio.wait([self._reading])


def clean_text(data: bytes, limit: int = MAX_TEXT) -> str:
    """Words of the guest's: bounded, and nothing in them that a terminal would obey."""
    text = data[: 4 * limit].decode(errors="replace")[:limit]
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _bounded(fields: list[tuple[Field, bytes]], what: str) -> bytes:
    payload = encode_fields(fields)
    if len(payload) > MAX_PAYLOAD:
        raise Refused(f"{what} is larger than {MAX_PAYLOAD // 1024} KiB", code="too-large")
    return payload


def _command_fields(command: Command) -> list[tuple[Field, bytes]]:
    if not command.argv:
        raise Refused("there is no program to run", code="invalid", field="argv")
    if any("=" in name or not name for name in command.env):
        raise Refused("a variable's name must not be empty and has no '=' in it", code="invalid", field="env")
    texts = [(Field.ARG, text) for text in command.argv]
    texts += [(Field.ENV, f"{name}={value}") for name, value in command.env.items()]
    texts += [(tag, text) for tag, text in ((Field.CWD, command.cwd), (Field.USER, command.user)) if text]
    if any("\0" in text for _, text in texts):
        raise Refused("no NUL may be in a command", code="invalid")
    fields = [(tag, text.encode(errors="surrogateescape")) for tag, text in texts]
    if command.tty:
        fields.append((Field.TTY, struct.pack("<HH", command.rows & 0xFFFF, command.columns & 0xFFFF)))
    if command.processes is not None:
        fields.append((Field.PROCESSES, struct.pack("<I", command.processes)))
    return fields


def _identity_fields(identity: Identity) -> list[tuple[Field, bytes]]:
    fields: list[tuple[Field, bytes]] = []
    if identity.time is not None:
        seconds = int(identity.time)
        fields.append((Field.TIME, struct.pack("<qI", seconds, int((identity.time - seconds) * 1e9))))
    values: tuple[tuple[Field, str | bytes | None], ...] = (
        (Field.SEED, identity.seed),
        (Field.HOSTNAME, identity.hostname),
        (Field.MACHINE_ID, identity.machine_id),
        (Field.HOST_KEY, identity.ssh_host_key),
        (Field.HOST_KEY_PUBLIC, identity.ssh_host_key_public),
        (Field.AUTHORIZED_KEYS, identity.authorized_keys),
        (Field.MAC, identity.mac),
        (Field.ADDRESS, identity.address),
        (Field.GATEWAY, identity.gateway),
        *((Field.DNS, server) for server in identity.dns),
    )
    fields += [(tag, v.encode() if isinstance(v, str) else v) for tag, v in values if v is not None]
    return fields
