"""Speaking with qemu-guest-agent, which stock images have. Enough to run programs, ask, identify and shut down.

Its protocol is one JSON object a line, one command at a time, without numbers to tell answers apart. So after the
connection is made and after every time-out comes ``guest-sync-delimited``: all up to its 0xFF byte is leftovers.
What it cannot do: a terminal, input while a program runs, output before its end. Its programs:
:mod:`corral.guest.qga_process`.
"""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

from corral.errors import CorralError, Refused, Unavailable
from corral.guest.protocol import Command, GuestInfo, Identity, Process
from corral.guest.qga_process import DEFAULT_PATH, QgaProcess, decoded
from corral.guest.resident import all_taken, clean_text, unresponsive
from corral.runtime import Runtime
from corral.runtime.sockets import reachable

MAX_LINE = 32 << 20
"""It captures at most 16 MiB of each output and sends it as base64, in one line."""
SYNC_AGAIN_S = 1.0
MAX_ADDRESSES = 64

# Values come in the environment, never as text of the script. What fails is named on stderr.
IDENTIFY = r"""
fail() { echo "$1" >&2; bad=1; }
bad=0
if [ -n "$C_SEED" ]; then printf %s "$C_SEED" | base64 -d > /dev/urandom || fail seed; fi
if [ -n "$C_HOSTNAME" ]; then
  printf '%s\n' "$C_HOSTNAME" > /etc/hostname && hostname "$C_HOSTNAME" || fail hostname
  { grep -v '^127\.0\.1\.1' /etc/hosts; printf '127.0.1.1 %s\n' "$C_HOSTNAME"; } > /etc/hosts.corral &&
    cat /etc/hosts.corral > /etc/hosts && rm -f /etc/hosts.corral || fail /etc/hosts
fi
if [ -n "$C_MACHINE_ID" ]; then
  rm -f /etc/machine-id; printf '%s\n' "$C_MACHINE_ID" > /etc/machine-id || fail machine-id
fi
umask 077
if [ -n "$C_HOST_KEY" ]; then
  printf %s "$C_HOST_KEY" | base64 -d > /etc/ssh/ssh_host_ed25519_key || fail ssh-host-key
  if [ -s /run/sshd.pid ]; then kill -HUP "$(cat /run/sshd.pid)" || fail sshd; fi
fi
if [ -n "$C_HOST_KEY_PUBLIC" ]; then
  printf %s "$C_HOST_KEY_PUBLIC" | base64 -d > /etc/ssh/ssh_host_ed25519_key.pub || fail ssh-host-key-public
fi
if [ -n "$C_AUTHORIZED" ]; then
  mkdir -p /root/.ssh && printf %s "$C_AUTHORIZED" | base64 -d > /root/.ssh/authorized_keys || fail authorized-keys
fi
umask 022
for dev in /sys/class/net/*; do dev="${dev##*/}"; [ "$dev" = lo ] || break; done
if [ -n "$C_MAC" ]; then
  ip link set dev "$dev" address "$C_MAC" ||
    { ip link set dev "$dev" down; ip link set dev "$dev" address "$C_MAC"; } || fail mac
fi
if [ -n "$C_ADDRESS" ]; then
  ip -4 addr flush dev "$dev" && ip addr add "$C_ADDRESS" dev "$dev" && ip link set dev "$dev" up || fail address
fi
if [ -n "$C_GATEWAY" ]; then ip route replace default via "$C_GATEWAY" dev "$dev" || fail gateway; fi
if [ -n "$C_DNS" ]; then
  rm -f /etc/resolv.conf; for ns in $C_DNS; do printf 'nameserver %s\n' "$ns"; done > /etc/resolv.conf || fail dns
fi
exit $bad
"""


async def open_qga(path: Path, rt: Runtime, *, timeout: float = 5.0) -> Qga:
    """Connect to the chardev socket ``path`` and wait until qemu-guest-agent answers.

    Raises Unavailable ``unresponsive`` when it does not within ``timeout`` seconds or there is no such socket.
    """
    try:
        async with asyncio.timeout(timeout):
            with reachable(path) as name:
                reader, writer = await asyncio.open_unix_connection(name, limit=MAX_LINE)
            guest = Qga(reader, writer, rt)
            try:
                await guest.sync()
            except BaseException:
                await guest.close()
                raise
            return guest
    except TimeoutError as error:
        raise unresponsive(f"qemu-guest-agent did not answer within {timeout:g} s") from error
    except OSError as error:
        raise unresponsive(f"qemu-guest-agent's channel cannot be opened: {error.strerror or error}") from error


class Qga:
    """Implements :class:`corral.guest.protocol.Guest`. Made by :func:`open_qga`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rt: Runtime) -> None:
        self._reader, self._writer, self._rt = reader, writer, rt
        self._turn = asyncio.Lock()
        self._in_step = False
        """Answers belong to questions; false after connecting and after a time-out."""

    # The line protocol.

    async def call(self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 5.0) -> Any:
        """One command, its ``return``. Raises ``unresponsive``, or ``guest`` with the agent's words."""
        try:
            async with asyncio.timeout(timeout), self._turn:
                if not self._in_step:
                    await self._sync()
                self._in_step = False
                self._write({"execute": command, **({"arguments": arguments} if arguments else {})})
                reply = await self._read()
                self._in_step = True
        except TimeoutError as error:
            raise unresponsive(f"qemu-guest-agent did not answer to {command} within {timeout:g} s") from error
        except OSError as error:
            raise unresponsive(f"qemu-guest-agent's channel failed: {error.strerror or error}") from error
        if "error" in reply:
            failure = reply["error"] if isinstance(reply["error"], dict) else {}
            unknown = failure.get("class") == "CommandNotFound"
            text = clean_text(str(failure.get("desc", "")).encode(errors="replace"), 1024) or "no reason given"
            if unknown:
                raise Refused(f"this qemu-guest-agent cannot do {command}: {text}", code="unsupported")
            raise CorralError(f"qemu-guest-agent refused {command}: {text}", code="guest")
        return reply["return"]

    async def sync(self) -> None:
        """Throw leftovers away until questions and answers are in step (bound it with a timeout)."""
        async with self._turn:
            await self._sync()

    async def _sync(self) -> None:
        number, asked = 0, False
        while True:
            if not asked or all_taken(self._writer):  # QEMU keeps a question until the guest opens its port
                number, asked = self._rt.random.below(1 << 52), True
                # The leading 0xFF ends a half sent line of an earlier connection in the agent's own parser.
                self._write({"execute": "guest-sync-delimited", "arguments": {"id": number}}, first=b"\xff")
            try:
                async with asyncio.timeout(SYNC_AGAIN_S):
                    while (await self._read(delimited=True)).get("return") != number:
                        pass
            except TimeoutError:
                continue
            self._in_step = True
            return

    def _write(self, message: dict[str, Any], *, first: bytes = b"") -> None:
        if self._writer.transport.is_closing():
            raise unresponsive("qemu-guest-agent's channel was closed")
        if self._writer.transport.get_write_buffer_size() > MAX_LINE:
            raise unresponsive("qemu-guest-agent has stopped taking data")
        self._writer.write(first + json.dumps(message).encode() + b"\n")

    async def _read(self, *, delimited: bool = False) -> dict[str, Any]:
        """The next answer; ``delimited``: what comes after the next 0xFF."""
        try:
            if delimited:
                await self._reader.readuntil(b"\xff")
            line = await self._reader.readuntil(b"\n")
            reply = json.loads(line)
        except asyncio.IncompleteReadError as error:
            raise unresponsive("qemu-guest-agent's channel was closed") from error
        except asyncio.LimitOverrunError as error:
            self._writer.transport.abort()
            raise CorralError("qemu-guest-agent sent a line without an end", code="guest") from error
        except (ValueError, RecursionError) as error:
            if delimited:
                return {}
            raise CorralError("qemu-guest-agent sent something that is not JSON", code="guest") from error
        if not isinstance(reply, dict) or not ("return" in reply or "error" in reply):
            if delimited:
                return {}
            raise CorralError("qemu-guest-agent sent something that is no answer", code="guest")
        return reply

    # corral.guest.protocol.Guest

    async def ping(self, timeout: float = 2.0) -> None:
        await self.call("guest-ping", timeout=timeout)

    async def info(self, timeout: float = 5.0) -> GuestInfo:
        try:
            async with asyncio.timeout(timeout):
                version = _get(await self.call("guest-info"), "version")
                name = _get(await self.call("guest-get-host-name"), "host-name")
                system = await self.call("guest-get-osinfo")
                addresses = _addresses(await self.call("guest-network-get-interfaces"))
                boot_id = await self._file("/proc/sys/kernel/random/boot_id") or b""
                ready = (
                    await self._file("/run/cloud-init/enabled") is None
                    or await self._file("/run/cloud-init/result.json") is not None
                )
        except TimeoutError as error:
            raise unresponsive(f"qemu-guest-agent did not answer within {timeout:g} s") from error
        return GuestInfo(
            agent="qemu-guest-agent",
            version=version,
            hostname=name,
            os=_get(system, "pretty-name"),
            kernel=_get(system, "kernel-release"),
            addresses=addresses,
            boot_id=clean_text(boot_id),
            ready=ready,
        )

    async def _file(self, path: str) -> bytes | None:
        """The first bytes of a file; None: there is none, or it may not be read."""
        try:
            handle = await self.call("guest-file-open", {"path": path, "mode": "r"})
        except CorralError as error:
            if error.code in ("guest", "unsupported"):
                return None
            raise
        reply = await self.call("guest-file-read", {"handle": handle, "count": 256})
        await self.call("guest-file-close", {"handle": handle})
        return decoded(reply, "buf-b64")

    async def run(self, command: Command) -> Process:
        """Its start waits for its input: errors of the start come from the process's ``output()``.

        Raises Refused ``unsupported`` for a terminal, and for a limit of processes.
        """
        if command.tty:
            raise Refused(
                "this guest has no terminal to give", code="unsupported", hint="its image has only qemu-guest-agent"
            )
        if command.processes is not None:
            raise Refused(
                "this guest cannot limit a program's processes", code="unsupported",
                hint="its image has only qemu-guest-agent; ask for no limit",
            )  # fmt: skip
        return QgaProcess(self.call, self._rt, command)

    async def identify(self, identity: Identity, timeout: float = 5.0) -> None:
        async with asyncio.timeout(timeout):
            if identity.time is not None:
                await self.call("guest-set-time", {"time": int(identity.time * 1e9)}, timeout=timeout)
            env = _identity_env(identity)
            if len(env) == 1:
                return
            process = QgaProcess(self.call, self._rt, Command(argv=("/bin/sh", "-c", IDENTIFY), env=env))
            words, status = await process.collect()
            if status:
                failed = "; ".join(clean_text(words).split())
                raise CorralError(f"the guest failed at taking its identity: {failed}", code="guest")

    async def shutdown(self, *, reboot: bool = False, timeout: float = 5.0) -> None:
        """It answers only when it refuses, so a short silence means that it obeys."""
        try:
            await self.call("guest-shutdown", {"mode": "reboot" if reboot else "powerdown"}, timeout=min(timeout, 1.0))
        except Unavailable:
            return

    async def close(self) -> None:
        self._writer.transport.abort()


def _get(reply: Any, key: str) -> str:
    value = reply.get(key) if isinstance(reply, dict) else None
    return clean_text(value.encode(errors="replace")) if isinstance(value, str) else ""


def _addresses(reply: Any) -> tuple[str, ...]:
    found: list[str] = []
    for interface in reply if isinstance(reply, list) else []:
        if not isinstance(interface, dict) or interface.get("name") == "lo":
            continue
        listed = interface.get("ip-addresses")
        found += [_get(entry, "ip-address") for entry in (listed if isinstance(listed, list) else [])]
    return tuple(text for text in found if text)[:MAX_ADDRESSES]


def _identity_env(identity: Identity) -> dict[str, str]:
    coded = {
        "C_SEED": identity.seed,
        "C_HOST_KEY": identity.ssh_host_key,
        "C_HOST_KEY_PUBLIC": identity.ssh_host_key_public,
        "C_AUTHORIZED": identity.authorized_keys,
    }
    plain = {
        "C_HOSTNAME": identity.hostname,
        "C_MACHINE_ID": identity.machine_id,
        "C_MAC": identity.mac,
        "C_ADDRESS": identity.address,
        "C_GATEWAY": identity.gateway,
        "C_DNS": " ".join(identity.dns) or None,
    }
    env = {"PATH": DEFAULT_PATH}
    env |= {name: base64.b64encode(data).decode() for name, data in coded.items() if data is not None}
    return env | {name: text for name, text in plain.items() if text is not None}
