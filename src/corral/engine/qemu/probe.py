"""The honest probe: an accelerator works only if a tiny guest really ran under it, just now, confined as VMs are.

That /dev/kvm opens says little, that it creates a VM not much more: there are hosts on which both succeed and every
stock kernel then hangs. The guest (probe_guest.S) touches what stock kernels need. The answer holds until the host is
booted again or QEMU is another one, and is kept in ``<state>/probe.json``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from corral.engine.protocol import Capabilities, Probe
from corral.engine.qemu import firmware, probe_guest
from corral.engine.qemu.arch import arch_of
from corral.engine.qemu.command import SANDBOX
from corral.engine.qemu.launcher import DEVICES, Launch, Privileges, binary, choose_uid, device_groups, spawn
from corral.engine.qemu.record import RunDir
from corral.errors import CorralError, Refused
from corral.runtime import Runtime, SystemClock, process
from corral.runtime.process import boot_id
from corral.runtime.sockets import reachable
from corral.units import MIB

KVM_LIMIT, TCG_LIMIT = 2.0, 20.0
"""Seconds. Real KVM needs a tenth of one; TCG a third, but it must not be written off because the host is busy now."""
OVERHEAD = {"kvm": 32 * MIB, "tcg": 64 * MIB}
"""QEMU's own memory: heap, stacks and device state; under TCG also its full translation buffer. Measured with a booted
guest: 54 MiB (micro image) to 67 MiB (a kernel that is copied, not mapped)."""
_VERSION = re.compile(r"version (\d+\.\d+(?:\.\d+)?)")


class _Cached(msgspec.Struct, frozen=True, kw_only=True):
    """``probe.json``."""

    boot_id: str
    binary: str
    """Path, size and time of the QEMU that was probed."""
    privileged: bool
    capabilities: Capabilities


async def probe(state: Path, rt: Runtime, *, again: bool = False) -> Capabilities:
    """What works on this host, from the cache or tried now. Raises Refused ``unsupported`` when nothing does."""
    arch = platform.machine()
    program = binary(arch_of(arch).binary)
    facts = os.stat(program)  # noqa: PTH116
    identity = f"{program} {facts.st_size} {facts.st_mtime_ns}"
    cached = None if again else _read(state)
    if cached is not None:
        known = (cached.boot_id, cached.binary, cached.privileged)
        if known == (boot_id(), identity, os.geteuid() == 0):
            return cached.capabilities
    found = await _find_out(state, rt, arch, program)
    _write(state, _Cached(boot_id=boot_id(), binary=identity, privileged=os.geteuid() == 0, capabilities=found))
    return found


def _read(state: Path) -> _Cached | None:
    try:
        return msgspec.json.decode((state / "probe.json").read_bytes(), type=_Cached)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _write(state: Path, record: _Cached) -> None:
    fresh = state / "probe.json.new"
    fresh.write_bytes(msgspec.json.encode(record))
    fresh.replace(state / "probe.json")


async def _find_out(state: Path, rt: Runtime, arch: str, program: str) -> Capabilities:
    probes = [
        Probe(name=name, works=works, reason=reason, at=rt.clock.now())
        for name in ("kvm", "tcg")
        for works, reason in [await try_accelerator(state, rt, name, program)]
    ]
    working = [one.name for one in probes if one.works]
    if not working:
        raise Refused(
            f"no VM can run here: {'; '.join(one.reason for one in probes)}",
            code="unsupported",
            hint="`corral doctor` shows what was tried",
        )
    try:
        firmware.find(arch)
        kinds: tuple[str, ...] = ("bios", "uefi")
    except Refused:
        kinds = ("bios",)
    return Capabilities(
        engine=f"QEMU {await asyncio.to_thread(_version, program)}",
        arch=arch,
        accelerator=working[0],
        probes=tuple(probes),
        machine_types=await asyncio.to_thread(_machine_types, program),
        firmware=kinds,
        overhead=OVERHEAD[working[0]],
    )


async def try_accelerator(state: Path, rt: Runtime, name: str, program: str) -> tuple[bool, str]:
    """Whether a tiny guest runs under ``kvm`` or ``tcg`` here, and a sentence that says what was seen."""
    if name == "kvm" and not os.path.exists("/dev/kvm"):  # noqa: PTH110, ASYNC240 - it does not block
        return False, "this host has no /dev/kvm: its CPU or its hypervisor offers no virtualization"
    if name == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False, "/dev/kvm may not be opened by this user: add it to the group kvm"
    if platform.machine() != "x86_64":
        return name == "tcg", f"not tried: there is no tiny guest for {platform.machine()} yet"
    limit = KVM_LIMIT if name == "kvm" else TCG_LIMIT
    model = "host" if name == "kvm" else arch_of("x86_64").cpu_emulated
    began = rt.clock.monotonic()
    try:
        status, stage, words = await run_guest(state, name, model, program, limit)
    except CorralError as error:
        return False, f"a tiny guest could not be started: {error.message}"
    took = rt.clock.monotonic() - began
    if status == probe_guest.EXIT_STATUS:
        return True, f"a tiny guest ran to its end in {took:.1f} s"
    opened = "/dev/kvm opens and creates VMs, but a tiny guest" if name == "kvm" else "a tiny guest"
    if status is None:
        return False, f"{opened} did not run within {limit:g} s: {probe_guest.STAGES.get(stage, 'it got lost')}"
    telling = [line for line in words.splitlines() if " info: " not in line and " warning: " not in line]
    last = telling[0] if telling else "without a word"
    return False, f"{opened} did not run: QEMU ended, {last[:200]}"


async def run_guest(
    state: Path, accelerator: str, model: str, program: str, limit: float
) -> tuple[int | None, str, str]:
    """Run the tiny guest: QEMU's exit status (None: killed after ``limit`` seconds), its last letter, QEMU's words."""
    with _workshop(state) as (run, image):
        privileges = Privileges.here()
        devices = (*DEVICES, "/dev/kvm") if accelerator == "kvm" else DEVICES
        launch = Launch(
            run=run,
            arguments=lambda sockets: [
                program, "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX,
                "-machine", "q35", "-cpu", model, "-accel", accelerator, "-m", "32", "-bios", str(image),
                "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
                "-chardev", f"socket,id=serial,fd={sockets['serial']},server=on,wait=on", "-serial", "chardev:serial",
            ],
            uid=choose_uid("probe", ()) if privileges.separate_users else None,
            namespaces=privileges.namespaces,
            devices=devices,
            groups=() if privileges.namespaces else device_groups(devices),
            mortal=True,
        )  # fmt: skip
        pid = await asyncio.shield(asyncio.to_thread(spawn, launch))
        pidfd = os.pidfd_open(pid)
        try:
            status, stage = await asyncio.to_thread(_follow, run, pidfd, limit)
        finally:
            os.close(pidfd)
        return status, stage, run.last_words()


@contextlib.contextmanager
def _workshop(state: Path) -> Iterator[tuple[RunDir, Path]]:
    """A machine's directory for the tiny guest and its firmware image, for as long as the block runs."""
    state.mkdir(mode=0o711, parents=True, exist_ok=True)
    for left in state.glob("probe-*"):  # by a daemon that was killed while it probed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="probe-", dir=state) as scratch:
        Path(scratch).chmod(0o711)
        run = RunDir(Path(scratch), "guest")
        run.make()
        image = run.vm / "guest.rom"
        image.write_bytes(probe_guest.rom())
        image.chmod(0o444)
        yield run, image


def _follow(run: RunDir, pidfd: int, limit: float) -> tuple[int | None, str]:
    """Read the guest's letters until its end, at most ``limit`` seconds; then kill it. Waits for the process."""
    letters = b""
    with socket.socket(socket.AF_UNIX) as serial:
        with reachable(run.socket("serial")) as address:
            serial.connect(address)
        stopped = _read_until_end(serial, limit)
        letters = stopped[0]
    if stopped[1]:
        process.send(pidfd, signal.SIGKILL)
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    ran_over = stopped[1] or result is None
    code = result.si_status if result is not None and result.si_code == os.CLD_EXITED else -1
    return None if ran_over else code, letters[-1:].decode("ascii", "replace")


def _read_until_end(serial: socket.socket, limit: float) -> tuple[bytes, bool]:
    """Bytes until the other side hangs up; True when ``limit`` seconds passed before."""
    letters = b""
    watch = SystemClock()
    end = watch.monotonic() + limit
    while (left := end - watch.monotonic()) > 0:
        serial.settimeout(left)
        try:
            piece = serial.recv(16)
        except TimeoutError:
            break
        except ConnectionResetError:
            return letters, False
        if not piece:
            return letters, False
        letters = (letters + piece)[-16:]
    return letters, True


def _version(program: str) -> str:
    text = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    found = _VERSION.search(text)
    return found[1] if found else text.splitlines()[0][:40]


def _machine_types(program: str) -> tuple[str, ...]:
    text = subprocess.run([program, "-machine", "help"], capture_output=True, text=True, timeout=10, check=True).stdout
    return tuple(line.split()[0] for line in text.splitlines()[1:] if line and line.split()[0].startswith("pc-q35"))
