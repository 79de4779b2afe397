"""One suite over the kernel's two interfaces: version 1 and 2 on pretended trees, and whatever this host really has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corral.errors import CorralError
from corral.host.cgroup import Groups, choose, claim, files
from corral.host.cgroup.claim import ATTRIBUTE
from corral.host.cgroup.none import NoGroups
from corral.host.cgroup.v1 import GroupsV1
from corral.host.cgroup.v2 import GroupsV2

ID = "6f1c2f0e-0000-4000-8000-000000000001"


def v1(root: Path) -> tuple[Groups, dict[str, Path]]:
    mounts = {name: root / name for name in ("cpu", "cpuacct", "memory")}
    for mount in mounts.values():
        mount.mkdir()
    groups = GroupsV1(mounts, "corral-test", 8)
    return groups, {
        "weight": mounts["cpu"] / "corral-test" / ID / "cpu.shares",
        "cap": mounts["cpu"] / "corral-test" / ID / "cpu.cfs_quota_us",
        "parent": mounts["cpu"] / "corral-test" / "cpu.shares",
        "memory": mounts["memory"] / "corral-test" / ID / "memory.limit_in_bytes",
    }


def v2(root: Path) -> tuple[Groups, dict[str, Path]]:
    base = root / "corral-test"
    return GroupsV2(root, "corral-test", 8, frozenset({"cpu", "memory"})), {
        "weight": base / ID / "cpu.weight", "cap": base / ID / "cpu.max", "parent": base / "cpu.weight",
        "memory": base / ID / "memory.max",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "weight", "parent", "cap", "lifted", "joined"),
    [(v1, "4096", "8192", "10000", "-1", 3), (v2, "2500", "800", "10000 20000", "max 20000", 1)],
)
def test_each_version_writes_its_own_words(
    tmp_path: Path, make: object, weight: str, parent: str, cap: str, lifted: str, joined: int
) -> None:
    groups, file = make(tmp_path)  # type: ignore[operator]
    files = groups.prepare(ID)
    assert len(files) == joined
    assert {path.name for path in files} == {"cgroup.procs"}
    assert file["parent"].read_text() == parent
    groups.weight(ID, 0.5)
    assert file["weight"].read_text() == weight
    groups.cap(ID, 0.5)
    assert file["cap"].read_text() == cap
    groups.cap(ID, None)
    assert file["cap"].read_text() == lifted
    groups.memory_limit(ID, 1 << 30)
    assert file["memory"].read_text() == str(1 << 30)
    assert (groups.shares, groups.limits_memory) == (True, True)
    assert groups.inventory() == [ID]


def test_what_was_used_is_read(tmp_path: Path) -> None:
    one, _ = v1(tmp_path)
    one.prepare(ID)
    (tmp_path / "cpuacct" / "corral-test" / ID / "cpuacct.usage").write_text("1500000000\n")
    (tmp_path / "cpu" / "corral-test" / ID / "cpu.stat").write_text("nr_periods 3\nthrottled_time 250000000\n")
    (tmp_path / "memory" / "corral-test" / ID / "memory.oom_control").write_text("under_oom 0\noom_kill 2\n")
    assert (one.meter(ID).usage(), one.meter(ID).throttled(), one.ooms(ID), one.starved(ID)) == (1.5, 0.25, 2, False)
    (tmp_path / "memory" / "corral-test" / ID / "memory.oom_control").write_text("oom_kill_disable 1\nunder_oom 1\n")
    assert one.starved(ID)
    (tmp_path / "two").mkdir()
    two, _ = v2(tmp_path / "two")
    two.prepare(ID)
    group = tmp_path / "two" / "corral-test" / ID
    (group / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\nthrottled_usec 250000\n")
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 2\n")
    assert (two.meter(ID).usage(), two.meter(ID).throttled(), two.ooms(ID), two.starved(ID)) == (1.5, 0.25, 2, False)


def test_a_group_that_is_not_there_has_used_nothing(tmp_path: Path) -> None:
    groups, _ = v1(tmp_path)
    assert (groups.meter(ID).usage(), groups.meter(ID).throttled(), groups.ooms(ID), groups.inventory()) == (
        0.0,
        0.0,
        0,
        [],
    )
    groups.remove(ID)


def test_a_hierarchy_that_cannot_be_written_is_not_chosen(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(
        f"cgroup {tmp_path}/missing/cpu cgroup rw,cpu 0 0\ncgroup {tmp_path}/missing/acct cgroup rw,cpuacct 0 0\n"
    )
    chosen = choose(tmp_path, tmp_path / "mounts")
    assert isinstance(chosen, NoGroups)
    assert "cannot be enforced" in chosen.describe()


def test_without_a_cpu_controller_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text("proc /proc proc rw 0 0\n")
    chosen = choose(tmp_path, tmp_path / "mounts")
    assert (chosen.shares, chosen.limits_memory) == (False, False)
    assert "no control groups" in chosen.describe()


def test_the_groups_of_this_host_work(tmp_path: Path) -> None:
    """For real: a process joins, is capped, is counted, and its group goes when it has gone."""
    groups = choose(tmp_path)
    if not groups.shares:
        pytest.skip(groups.describe())
    files = groups.prepare(ID)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for file in files:
            file.write_text(str(busy.pid))
        groups.weight(ID, 0.5)
        groups.cap(ID, 0.2)
        meter = groups.meter(ID)
        before, began = meter.usage(), time.monotonic()
        time.sleep(1.0)
        used = (meter.usage() - before) / (time.monotonic() - began)
        assert 0 < used < 0.3
        assert meter.throttled() > 0
        with pytest.raises(CorralError, match="still has a process"):
            groups.remove(ID)
        groups.close()
        assert groups.inventory() == [ID], "a daemon that ends leaves running VMs alone"
    finally:
        busy.kill()
        busy.wait()
    groups.remove(ID)
    assert ID not in groups.inventory()
    groups.close()
    assert [file.parent.parent for file in files if file.parent.parent.exists()] == []


def test_a_mounted_version_2_counts_and_clears_up_as_the_pretended_one(tmp_path: Path) -> None:
    """Against the kernel's own files. Where its cpu controller is taken by version 1 it still counts CPU time."""
    rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(where) for _, where, kind, *_ in rows if kind == "cgroup2"), None)
    if root is None or os.geteuid() != 0:
        pytest.skip("no cgroup v2 that we may write")
    has = frozenset((root / "cgroup.controllers").read_text().split())
    name = f"corral-test-{os.getpid()}"
    groups = GroupsV2(root, name, 2, has)
    group = root / name / ID
    if "cpu" in has:
        groups.prepare(ID)
        groups.cap(ID, 0.2)
    else:
        with pytest.raises(CorralError, match=r"cpu\.weight"):
            groups.prepare(ID)
        group.mkdir()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        (group / "cgroup.procs").write_text(str(busy.pid))
        meter = groups.meter(ID)
        before, began = meter.usage(), time.monotonic()
        time.sleep(0.5)
        assert 0 < meter.usage() - before <= time.monotonic() - began + 0.05
        assert groups.inventory() == [ID]
        with pytest.raises(CorralError, match="still has a process"):
            groups.remove(ID)
    finally:
        busy.kill()
        busy.wait()
    groups.remove(ID)
    assert groups.inventory() == []
    (root / name).rmdir()


class Systemd:
    """A pretended systemd: its two commands, and the hierarchy in which it makes a service's group."""

    def __init__(self, where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls, self.init = where / "cgroup", where / "calls", where / "init"
        self.init.mkdir()
        self.root.mkdir()
        (self.root / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
        self.mounts = where / "mounts"
        self.mounts.write_text(f"cgroup2 {self.root} cgroup2 rw 0 0\n")
        commands = where / "bin"
        commands.mkdir()
        self.group = self.root / "machine.slice" / "unit"
        self._command(commands / "systemctl", f'[ -d {self.group} ] && echo /machine.slice/unit || echo ""')
        self._command(
            commands / "systemd-run",
            f'echo "$@" >> {self.calls}; mkdir -p {self.group}; echo 4242 > {self.group}/cgroup.procs; '
            f"echo cpu memory > {self.group}/cgroup.controllers",
        )
        monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        # In the kernel's file system a group's own files do not keep it from being removed.
        monkeypatch.setattr(files, "remove", lambda path: shutil.rmtree(path, ignore_errors=True))

    def _command(self, path: Path, script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def choose(self, state: Path) -> Groups:
        return choose(state, self.mounts, self.init)


def test_where_systemd_runs_it_is_asked_for_a_part_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd = Systemd(tmp_path, monkeypatch)
    groups = systemd.choose(tmp_path)
    assert groups.shares, groups.describe()
    asked = systemd.calls.read_text()
    assert "--property=Delegate=yes" in asked
    assert f"--property=CPUWeight={100 * len(os.sched_getaffinity(0))}" in asked
    # A group that hands controllers down holds no processes itself.
    assert (systemd.group / "keeper" / "cgroup.procs").read_text() == "4242"
    assert (systemd.group / "cgroup.subtree_control").read_text() == "+cpu +memory"
    groups.prepare(ID)
    groups.cap(ID, 0.5)
    assert (systemd.group / "vms" / ID / "cpu.max").read_text() == "10000 20000"
    systemd.choose(tmp_path)
    assert len(systemd.calls.read_text().splitlines()) == 1  # it is there already


def test_a_systemd_that_refuses_is_named_and_vms_run_without_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd = Systemd(tmp_path, monkeypatch)
    systemd._command(tmp_path / "bin" / "systemd-run", "echo 'Access denied' >&2; exit 1")
    groups = systemd.choose(tmp_path)
    assert not groups.shares
    assert "systemd-run refused: Access denied" in groups.describe()


def test_a_systemd_without_the_cpu_controller_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd = Systemd(tmp_path, monkeypatch)
    systemd.choose(tmp_path)
    (systemd.group / "cgroup.controllers").write_text("memory pids\n")
    assert "no cpu controller" in systemd.choose(tmp_path).describe()


def removed_when_empty(groups: Groups, id: str) -> None:
    """The kernel lets go of a process a moment after it has ended."""
    for last in range(100, 0, -1):
        try:
            groups.remove(id)
            break
        except CorralError:
            if last == 1:
                raise
            time.sleep(0.02)


def test_what_a_state_directory_that_is_gone_has_left_is_removed_by_the_next_daemon(tmp_path: Path) -> None:
    states = [tmp_path / name for name in ("gone", "there", "busy", "unsigned", "ours")]
    for state in states:
        state.mkdir()
    gone, there, busy, unsigned, ours = (choose(state) for state in states)
    if not ours.shares:
        pytest.skip(ours.describe())
    process = subprocess.Popen(["sleep", "60"])
    try:
        for groups, state in zip((gone, there, busy), states, strict=False):
            groups.prepare(ID)
            claim(groups, state)
        if ATTRIBUTE not in os.listxattr(gone.parents[0]):
            pytest.skip("attributes of groups cannot be written here")
        unsigned.prepare(ID)
        for file in busy.prepare("other"):
            file.write_text(f"{process.pid}\n")
        for state in (states[0], states[2], states[3]):
            state.rmdir()
        claim(ours, states[4])
        assert gone.inventory() == []
        assert not any(parent.exists() for parent in gone.parents)
        assert there.inventory() == [ID], "its daemon may come back"
        assert busy.inventory() == ["other"], "somebody runs there"
        assert unsigned.inventory() == [ID], "nobody knows whose it is"
        assert all(parent.exists() for parent in ours.parents)
    finally:
        process.kill()
        process.wait()
        for groups in (gone, there, busy, unsigned, ours):
            for id in groups.inventory():
                removed_when_empty(groups, id)
            groups.close()
