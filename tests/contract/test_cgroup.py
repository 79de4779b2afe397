"""One suite over the kernel's two interfaces: version 1 and 2 on pretended trees, and whatever this host really has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corral.errors import CorralError
from corral.host.cgroup import Groups, choose
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
    assert (one.usage(ID), one.throttled(ID), one.ooms(ID)) == (1.5, 0.25, 2)
    (tmp_path / "two").mkdir()
    two, _ = v2(tmp_path / "two")
    two.prepare(ID)
    group = tmp_path / "two" / "corral-test" / ID
    (group / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\nthrottled_usec 250000\n")
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 2\n")
    assert (two.usage(ID), two.throttled(ID), two.ooms(ID)) == (1.5, 0.25, 2)


def test_a_group_that_is_not_there_has_used_nothing(tmp_path: Path) -> None:
    groups, _ = v1(tmp_path)
    assert (groups.usage(ID), groups.throttled(ID), groups.ooms(ID), groups.inventory()) == (0.0, 0.0, 0, [])
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
        before, began = groups.usage(ID), time.monotonic()
        time.sleep(1.0)
        used = (groups.usage(ID) - before) / (time.monotonic() - began)
        assert 0 < used < 0.3
        assert groups.throttled(ID) > 0
        with pytest.raises(CorralError, match="still has a process"):
            groups.remove(ID)
    finally:
        busy.kill()
        busy.wait()
    groups.remove(ID)
    assert ID not in groups.inventory()
    for parent in {file.parent.parent for file in files}:
        os.rmdir(parent)
