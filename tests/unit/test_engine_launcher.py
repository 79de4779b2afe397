"""Rights of a VM's process: users, files, ports; firmware descriptors; records; what the host says of processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.engine.protocol import Card, Drive, Exit, HostForward, KernelBoot, Layer, Machine
from corral.engine.qemu import firmware
from corral.engine.qemu.launcher import (
    FIRST_UID,
    UID_COUNT,
    Launch,
    Privileges,
    check_ports,
    choose_uid,
    confinement,
    grant,
    program,
    spawn,
)
from corral.engine.qemu.record import MAX_LOG, Record, RunDir, ended
from corral.errors import CorralError, Refused, Unknown
from corral.host import facts
from corral.host.process import cost
from corral.runtime import process
from corral.runtime.sockets import reachable

ID = "11111111-2222-4333-8444-555555555555"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def machine(**more: object) -> Machine:
    return Machine(**({"id": ID, "name": "x", "memory": 64 << 20} | more))  # type: ignore[arg-type]


@given(id=st.text(), taken=st.sets(st.integers(FIRST_UID, FIRST_UID + 50), max_size=20))
def test_a_vm_keeps_its_user_and_shares_it_with_nobody(id: str, taken: set[int]) -> None:
    uid = choose_uid(id, taken)
    assert uid not in taken
    assert FIRST_UID <= uid < FIRST_UID + UID_COUNT
    assert choose_uid(id, taken) == uid
    assert choose_uid(id, {uid}) != uid


def test_a_confined_start_names_what_it_may_write_and_touch(tmp_path: Path) -> None:
    launch = Launch(
        run=RunDir(tmp_path, ID), arguments=lambda _: [], uid=FIRST_UID, namespaces=True,
        writable=(tmp_path,), devices=("/dev/null", "/dev/no-such-device"), groups=(5,),
    )  # fmt: skip
    assert confinement(launch) == [
        f"uid={FIRST_UID}", "groups=5", "namespaces=1", f"writable={tmp_path}", "device=/dev/null",
    ]  # fmt: skip
    plain = Launch(run=RunDir(tmp_path, ID), arguments=lambda _: [], uid=None, namespaces=False)
    assert confinement(plain) == []


@AS_ROOT
def test_writable_disks_become_the_vms_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path, ID)
    run.make()
    (tmp_path / "base").write_bytes(b"")
    (tmp_path / "base").chmod(0o444)
    _open_up(tmp_path)
    disk, seed = run.vm / "root", run.vm / "seed"
    for path in (disk, seed):
        path.write_bytes(b"")
        path.chmod(0o600)
    drives = (
        Drive(name="root", path=disk, format="qcow2", layers=(Layer(path=tmp_path / "base", format="qcow2"),)),
        Drive(name="seed", path=seed, format="raw", readonly=True),
    )
    grant(machine(drives=drives), run, FIRST_UID)
    assert {path.stat().st_uid for path in (disk, seed)} == {FIRST_UID}
    assert (tmp_path / "base").stat().st_uid == 0


@AS_ROOT
def test_a_link_is_never_given_away(tmp_path: Path) -> None:
    run = RunDir(tmp_path, ID)
    run.make()
    victim = tmp_path / "victim"
    victim.write_text("secret")
    (run.vm / "root").symlink_to(victim)
    with pytest.raises(CorralError, match="cannot be used as a disk"):
        grant(machine(drives=(Drive(name="root", path=run.vm / "root", format="raw"),)), run, FIRST_UID)
    with pytest.raises(CorralError, match="not a regular file"):
        grant(machine(drives=(Drive(name="root", path=Path("/dev/null"), format="raw"),)), run, FIRST_UID)
    assert victim.stat().st_uid == 0


def test_images_that_the_vm_could_not_read_are_refused_with_a_hint(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"")
    kernel.chmod(0o600)
    with pytest.raises(CorralError, match="not readable"):
        grant(machine(kernel=KernelBoot(kernel=kernel)), RunDir(tmp_path, ID), FIRST_UID)
    kernel.chmod(0o644)
    tmp_path.chmod(0o700)
    with pytest.raises(CorralError, match="cannot be entered") as caught:
        grant(machine(kernel=KernelBoot(kernel=kernel)), RunDir(tmp_path, ID), FIRST_UID)
    assert "chmod o+x" in caught.value.hint


def test_taken_ports_are_refused_and_free_ones_left_free() -> None:
    for protocol, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)):
        with socket.socket(socket.AF_INET, kind) as holder:
            holder.bind(("127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                holder.listen()
            port = holder.getsockname()[1]
            forward = HostForward(protocol=protocol, address="127.0.0.1", host=port, guest=1)  # type: ignore[arg-type]
            wanted = machine(cards=(Card(name="n", mac="52:54:00:00:00:01", hostname="", forwards=(forward,)),))
            with pytest.raises(Refused) as caught:
                check_ports(wanted)
            assert (caught.value.code, caught.value.field) == ("in-use", "ports")
        check_ports(wanted)
        check_ports(wanted)


def test_nothing_is_started_while_the_lock_is_held(tmp_path: Path) -> None:
    run = RunDir(tmp_path, ID)
    run.make()
    lock = run.take_lock()
    assert lock is not None
    assert run.has_process()
    marker = tmp_path / "ran"
    launch = Launch(run=run, arguments=lambda _: ["/usr/bin/touch", str(marker)], uid=None, namespaces=False)
    with pytest.raises(Unknown):
        spawn(launch)
    os.close(lock)
    assert not run.has_process()
    assert not marker.exists()


def test_a_started_process_is_our_child_holds_the_lock_and_has_its_sockets(tmp_path: Path) -> None:
    run = RunDir(tmp_path, ID)
    run.make()
    launch = Launch(
        run=run,
        arguments=lambda fds: ["/bin/sh", "-c", f"echo {len(fds)} sockets >&2; exec sleep 30"],
        uid=None,
        namespaces=False,
    )
    pid = spawn(launch)
    try:
        now = process.stat(pid)
        assert now is not None
        assert now.parent == os.getpid()
        assert os.getsid(pid) == pid
        assert run.has_process()
        with socket.socket(socket.AF_UNIX) as client, reachable(run.socket("qmp")) as address:
            client.connect(address)
        assert process.working_directory(pid) == str(run.path)
        while "4 sockets" not in run.last_words():
            time.sleep(0.01)
        before = len(list(Path("/proc/self/fd").iterdir()))
        pidfd = process.open_pidfd(pid, now.start)
        assert pidfd is not None
        assert process.open_pidfd(pid, now.start + 1) is None
        assert process.send(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        assert process.open_pidfd(pid, now.start) is None
        assert not process.send(pidfd, signal.SIGKILL)
        os.close(pidfd)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    finally:
        if process.stat(pid) is not None:
            os.kill(pid, signal.SIGKILL)
    assert not run.has_process()


def test_a_program_that_cannot_be_executed_says_so(tmp_path: Path) -> None:
    run = RunDir(tmp_path, ID)
    run.make()
    pid = spawn(Launch(run=run, arguments=lambda _: ["/no/such/qemu"], uid=None, namespaces=False))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 126
    assert "No such file" in run.last_words()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "usage: corral-launch report=FD OPTIONS -- PROGRAM ARGUMENTS"),
        (["report=one"], "one: Invalid argument"),
        (["report=1", "join=/no/such/group"], "enter /no/such/group: No such file or directory"),
        (["report=1", "uid=-1"], "-1: Invalid argument"),
    ],
)
def test_the_launcher_says_what_stands_in_the_way(options: list[str], told: str) -> None:
    done = subprocess.run([str(program()), *options, "--", "/bin/true"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (126, f"corral-launch: {told}\n")


@AS_ROOT
@pytest.mark.skipif(not shutil.which("gcc"), reason="no compiler with sanitizers")
@pytest.mark.skipif(not Privileges.here().namespaces, reason="no namespaces can be made here")
def test_the_launcher_confines_and_touches_no_memory_that_is_not_its_own(tmp_path: Path) -> None:
    source, checked = Path(__file__).parents[2] / "launcher/launch.c", tmp_path / "corral-launch"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, "-o", str(checked), str(source)], check=True)
    _open_up(tmp_path)
    ours = tmp_path / "ours"
    ours.mkdir()
    os.chown(ours, FIRST_UID, FIRST_UID)
    group = tmp_path / "group"
    group.write_text("")
    script = f"id -u; id -G; echo $$; ls /dev; touch {ours}/x && echo made; touch {tmp_path}/x; grep -E 'Cap(Eff|Bnd)' /proc/$$/status"
    read, report = os.pipe()
    done = subprocess.run(
        [str(checked), f"report={report}", f"uid={FIRST_UID}", "groups=7,9", "namespaces=1", f"writable={ours}",
         "device=/dev/null", "device=/dev/zero", f"join={group}", "spare=1", "--", "/bin/sh", "-c", script],
        pass_fds=[report], capture_output=True, text=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    os.close(report)
    with os.fdopen(read, "rb") as told:
        os.waitpid(int(told.read()), 0)
    uid, groups, pid, *rest = done.stdout.splitlines()
    assert (int(uid), groups.split(), pid) == (FIRST_UID, [str(FIRST_UID), "7", "9"], "1")
    assert rest[:3] == ["null", "zero", "made"]
    assert [line.split()[1] for line in rest[3:]] == ["0" * 16] * 2
    assert "Read-only file system" in done.stderr
    assert int(group.read_text()) > 0


def test_records_survive_the_disk_and_damage_is_no_record(tmp_path: Path) -> None:
    run = RunDir(tmp_path, ID)
    assert run.read() is None
    run.make()
    boot = KernelBoot(kernel=Path("/k"), cmdline="x")
    record = Record(machine=machine(kernel=boot), boot_id="b", accelerator="tcg", exit=Exit(asked=True))
    run.write(record)
    assert run.read() == record
    assert run.record.stat().st_mode & 0o777 == 0o600
    run.record.write_bytes(b"\xff{")
    assert run.read() is None


@pytest.mark.parametrize(
    ("log", "asked", "code", "known", "reason", "good"),
    [
        ("qemu_system_shutdown_request reason=6\n", False, 0, True, "guest-shutdown", True),
        ("warning\nqemu_system_shutdown_request reason=6\n", False, None, False, "guest-shutdown", True),
        ("qemu_system_shutdown_request reason=4\n", False, 0, True, "host-signal", False),
        ("qemu_system_shutdown_request reason=6\n", True, None, True, "killed", True),
        ("qemu_system_shutdown_request reason=99\n", False, 0, True, "exited", False),
        ("Assertion failed\n", False, None, True, "crashed", False),
        ("", False, None, False, "vanished", False),
    ],
)
def test_how_a_machine_ended(
    tmp_path: Path, log: str, asked: bool, code: int | None, known: bool, reason: str, good: bool
) -> None:
    run = RunDir(tmp_path, ID)
    run.make()
    run.log.write_text(log)
    record = Record(machine=machine(), boot_id="b", accelerator="tcg", pid=1, asked=asked)
    exit = ended(run, record, code, None, known=known)
    assert (exit.reason, exit.asked) == (reason, good)
    assert "reason=" not in exit.last_words


def test_a_log_cannot_grow_without_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path, ID)
    run.make()
    run.log.write_bytes(b"x" * (MAX_LOG + 1))
    assert len(run.last_words()) <= 2048
    run.bound_log()
    assert run.log.stat().st_size == 0


def test_removal_spares_disks_and_the_variables_beside_them(tmp_path: Path) -> None:
    run = RunDir(tmp_path, ID)
    run.make()
    run.variables.write_bytes(b"")
    (run.vm / "root.qcow2").write_bytes(b"")
    run.remove()
    assert {path.name for path in run.vm.iterdir()} == {"root.qcow2", "nvram.fd"}
    (run.vm / "root.qcow2").unlink()
    run.remove()
    assert not run.vm.exists()
    run.remove()


def _descriptor(path: Path, **changes: object) -> None:
    plain = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(path.parent / "code"), "format": "raw"},
            "nvram-template": {"filename": str(path.parent / "vars"), "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": ["acpi-s3"],
    }
    path.write_text(json.dumps(plain | changes))


def test_firmware_comes_from_the_first_fitting_descriptor(tmp_path: Path) -> None:
    (tmp_path / "code").write_bytes(b"")
    (tmp_path / "vars").write_bytes(b"")
    (tmp_path / "00.json").write_text("{ not json")
    _descriptor(tmp_path / "10.json", features=["requires-smm", "secure-boot"])
    _descriptor(tmp_path / "20.json", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    _descriptor(tmp_path / "30.json", mapping={"device": "memory"})
    _descriptor(tmp_path / "40.json")
    found = firmware.find("x86_64", tmp_path)
    assert (found.code, found.variables) == (tmp_path / "code", tmp_path / "vars")


def test_missing_firmware_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        firmware.find("riscv64", tmp_path)
    assert caught.value.code == "unsupported"
    assert "install" in caught.value.hint


def test_facts_of_this_host(tmp_path: Path) -> None:
    found = facts.facts(tmp_path / "not" / "there" / "yet")
    assert 0 < found.memory_available <= found.memory
    assert found.cpus >= 1
    assert found.disk_free > 0
    assert len(found.boot_id) == 36
    assert found.privileged == (os.geteuid() == 0)


def test_processes_are_found_by_two_neighbouring_arguments() -> None:
    child = subprocess.Popen(["sleep", "30", "7.25"])
    try:
        while not process.command_line(child.pid):  # the kernel shows the arguments a moment after the exec
            time.sleep(0.001)
        assert child.pid in process.with_arguments(b"30", b"7.25")
        assert child.pid not in process.with_arguments(b"7.25", b"30")
        assert process.command_line(child.pid) == [b"sleep", b"30", b"7.25"]
        spent = cost(child.pid)
        assert spent is not None
        assert 0 < spent.memory.anonymous <= spent.memory.rss
    finally:
        child.kill()
        child.wait()
    assert process.stat(child.pid) is None
    assert process.command_line(child.pid) == []
    assert cost(child.pid) is None


def _open_up(path: Path) -> None:
    """pytest's directories are closed to others; the VM's user must get through."""
    for parent in (path, *path.parents):
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
