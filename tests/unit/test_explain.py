"""Why is it slow: each reason from numbers, and silence about what is not the reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from corral.cli.why import in_words
from corral.model import Cpu, Disk, Meta, Phase, Vm, VmSpec, VmStatus
from corral.model.usage import CpuUsage, DiskUsage, HostUsage, MemoryUsage, ProjectUsage, Usage, VmUsage
from corral.scheduler.explain import Effect, Finding, explain, summary

MIB = 1 << 20


def vm(name: str = "web", *, phase: Phase = Phase.RUNNING, reason: str = "", failures: int = 0, **cpu: Any) -> Vm:
    return Vm(
        meta=Meta(id=name, name=name),
        spec=VmSpec(image="micro", cpu=Cpu(**cpu)),
        status=VmStatus(phase=phase, reason=reason, failures=failures, host="here", accelerator="kvm"),
    )


def row(
    name: str = "web", *, project: str = "default", accelerator: str = "kvm", limit: float = 1.0, **cpu: Any
) -> VmUsage:
    """A VM that has all it wants: a tenth of a core, unless something else is said."""
    figures = {"weight": 100, "reserve": 0.0, "entitled": 0.1, "granted": 1.0, "used": 0.1, "wanted": 0.11, "wait": 0.0}
    return VmUsage(
        id=name, name=name, project=project, phase=Phase.RUNNING, accelerator=accelerator,
        cpu=CpuUsage(limit=limit, throttled=cpu.pop("throttled", 0.0), **(figures | cpu)),
        memory=MemoryUsage(size=512 * MIB, used=100 * MIB),
    )  # fmt: skip


def host(**fields: Any) -> HostUsage:
    given = {
        "memory": 8 << 30,
        "memory_available": 4 << 30,
        "shares": True,
        "period_s": 15.0,
        "idle": 0.5,
        "foreign": 0.0,
    }
    return HostUsage(name="here", cores=2, **(given | fields))


def project(name: str = "default", **fields: Any) -> ProjectUsage:
    return ProjectUsage(name=name, vms=1, **({"weight": 100, "reserve": 0.0, "limit": None} | fields))


def usage(*rows: VmUsage, projects: tuple[ProjectUsage, ...] = (), **fields: Any) -> Usage:
    return Usage(at=1.0, host=host(**fields), vms=rows, projects=projects or (project(),))


def codes(found: tuple[Finding, ...]) -> list[str]:
    return [finding.code for finding in found]


HUNGRY = {"entitled": 0.5, "granted": 0.5, "used": 0.5, "wanted": 1.0, "wait": 0.5}
RIVAL = {"entitled": 1.0, "granted": 1.0, "used": 1.0, "wanted": 1.0, "wait": 0.0}


def test_an_idle_vm_is_not_limited_by_the_platform() -> None:
    (finding,) = explain(vm(), usage(row(used=0.03, wanted=0.03)))
    assert (finding.code, finding.effect) == ("idle", Effect.FINE)
    assert finding.message == "it used 3% of a core and waited for nothing: the platform does not limit it"
    assert "corral exec web" in finding.hint


def test_a_vm_that_has_what_it_asks_for_is_not_limited_either() -> None:
    (finding,) = explain(vm(), usage(row(used=0.42, wanted=0.46), row("db", **RIVAL)))
    assert finding.code == "satisfied"
    assert "0.42 cores" in finding.message


def test_its_own_limit() -> None:
    found = explain(vm(limit=0.2), usage(row(limit=0.2, entitled=0.2, used=0.2, wanted=1.0, wait=0.8, throttled=0.78)))
    assert codes(found) == ["cpu-limit"]
    assert found[0].message == (
        "its own cpu.limit of 0.2 cores holds it back: it used 0.20, and was held for 0.78 cores' time more"
    )
    assert found[0].hint == "corral vm set web cpu.limit=none"
    assert codes(explain(vm(limit=0.2), usage(row(limit=0.2, used=0.1)))) == ["satisfied"], (
        "a limit that is not reached"
    )


def test_savings_are_spent_above_the_limit() -> None:
    spending = row(limit=0.2, entitled=0.9, used=0.9, wanted=0.9, saved=5.0)
    assert codes(explain(vm(limit=0.2, burst=10.0), usage(spending))) == ["satisfied"]
    spent = row(limit=0.2, entitled=0.2, used=0.2, wanted=1.0, wait=0.8, throttled=0.7, saved=0.0)
    assert codes(explain(vm(limit=0.2, burst=10.0), usage(spent))) == ["cpu-limit"]


def test_who_has_all_that_its_limit_allows_is_not_held_back_by_others() -> None:
    one = row(limit=0.2, entitled=0.2, used=0.2, wanted=1.0, wait=0.8, throttled=0.3)
    assert codes(explain(vm(limit=0.2), usage(one, row("db", **RIVAL), foreign=1.0))) == ["cpu-limit"]
    less = row(limit=0.5, entitled=0.3, used=0.3, wanted=1.0, wait=0.7)
    assert codes(explain(vm(limit=0.5), usage(less, row("db", **RIVAL)))) == ["cpu-weight"]


def test_the_limit_of_its_project() -> None:
    one = row(used=0.3, entitled=0.3, wanted=1.0, wait=0.7, throttled=0.69)
    found = explain(vm(), usage(one, projects=(project(limit=0.3, used=0.3),)))
    assert codes(found) == ["project-limit"]
    assert "may use 0.3 cores together and used 0.30" in found[0].message


def test_all_its_cpus_are_busy() -> None:
    found = explain(vm(), usage(row(used=0.99, entitled=1.0, wanted=1.0)))
    assert codes(found) == ["cpu-count"]
    assert "cpu.count=2" in found[0].hint
    two = explain(vm(count=2), usage(row(limit=2.0, used=2.0, entitled=2.0, wanted=2.0)))
    assert codes(two) == ["satisfied"], "the host has no more cores than that"


def test_its_weight_against_whom() -> None:
    busy = row("db", **RIVAL | {"weight": 300})
    found = explain(vm(), usage(row(**HUNGRY), busy, row("quiet")))
    assert codes(found) == ["cpu-weight"]
    assert found[0].message == (
        "it wants 1.00 cores, is entitled to 0.50 and used 0.50: its cpu.weight is 100, and others want CPU time too: "
        "db (weight 300) used 1.00, quiet (weight 100) used 0.10"
    )
    assert found[0].hint == "corral vm set web cpu.weight=200"


def test_many_neighbours_are_not_all_named() -> None:
    busy = [row(f"n{number}", **HUNGRY) for number in range(9)]
    (finding,) = explain(vm(), usage(row(**HUNGRY), *busy))
    assert finding.message.endswith("n2 (weight 100) used 0.50 and 6 more")


def test_the_weight_of_its_project_against_others() -> None:
    others = project("batch", weight=300, used=1.5)
    found = explain(
        vm(), usage(row(**HUNGRY), row("b", project="batch", **RIVAL), projects=(project(used=0.5), others))
    )
    assert codes(found) == ["project-weight"]
    assert found[0].message == (
        "its project default (weight 100) shares the host with others: batch (weight 300) used 1.50"
    )


def test_reservations_of_others_only_where_they_bind() -> None:
    reserved = row("db", **RIVAL | {"reserve": 0.8})
    assert codes(explain(vm(), usage(row(**HUNGRY), reserved))) == ["cpu-weight", "reservations"]
    equal = row("db", **HUNGRY | {"reserve": 0.2})
    assert codes(explain(vm(), usage(row(**HUNGRY), equal))) == ["cpu-weight"], "its weight gives it more than that"


def test_other_programs_of_the_host() -> None:
    found = explain(vm(), usage(row(**HUNGRY), foreign=1.4))
    assert codes(found) == ["foreign-load"]
    assert "other programs of here use 1.40 of its 2 cores" in found[0].message
    assert codes(explain(vm(), usage(row(), foreign=1.4))) == ["satisfied"], "it misses nothing"
    little, much = row("db", **RIVAL | {"used": 0.2}), row("db", **RIVAL)
    assert codes(explain(vm(), usage(row(**HUNGRY), little, foreign=1.3))) == ["foreign-load", "cpu-weight"]
    assert codes(explain(vm(), usage(row(**HUNGRY), much, foreign=0.5))) == ["cpu-weight", "foreign-load"]


def test_shares_that_nobody_enforces() -> None:
    found = explain(vm(), usage(row(**HUNGRY), shares=False, mode="nice values"))
    assert codes(found) == ["not-enforced"]
    assert "nice values" in found[0].message


def test_less_than_its_entitlement_although_nobody_else_has_it() -> None:
    assert codes(explain(vm(), usage(row(**HUNGRY | {"used": 0.3})))) == ["short"]


def test_emulated_cpus_slow_everything_and_are_told_last() -> None:
    found = explain(vm(limit=0.2), usage(row(accelerator="tcg", limit=0.2, used=0.2, throttled=0.5, wait=0.5)))
    assert [(one.code, one.effect) for one in found] == [("cpu-limit", "limits"), ("emulated", "slows")]
    assert codes(explain(vm(), usage(row(accelerator="tcg", used=0.01)))) == ["emulated", "idle"]


def drive(**fields: Any) -> DiskUsage:
    return DiskUsage(name="root", read=0, written=0, reads=0, writes=0, flushes=0, **{"failed": 0, **fields})


def test_limits_of_its_disk() -> None:
    def why(limits: Disk, **rates: float) -> list[str]:
        web = vm()
        web = msgspec.structs.replace(web, spec=msgspec.structs.replace(web.spec, disk=limits))
        return codes(explain(web, usage(msgspec.structs.replace(row(), disks=(drive(**rates),)))))

    busy = {"iops": 480.0, "read_rate": 6.0 * MIB, "write_rate": 3.5 * MIB}
    assert why(Disk(iops=500), **busy) == ["disk-iops"]
    assert why(Disk(bandwidth=10 * MIB), **busy) == ["disk-bandwidth"]
    assert why(Disk(iops=1000, bandwidth=20 * MIB), **busy) == ["satisfied"]
    assert why(Disk(), **busy) == ["satisfied"]
    assert why(Disk(iops=500)) == ["satisfied"], "a first look knows no rates"
    assert why(Disk(iops=100, iops_burst=1000), **busy) == ["satisfied"], "it spends credit"
    assert why(Disk(iops=100, iops_burst=500), **busy) == ["disk-iops"]


def test_requests_that_failed() -> None:
    found = explain(vm(), usage(msgspec.structs.replace(row(), disks=(drive(failed=7),))))
    assert codes(found) == ["disk-failing", "satisfied"]
    assert "7 of the requests" in found[0].message


def test_memory_that_its_balloon_has_taken() -> None:
    def why(**memory: Any) -> list[tuple[str, str]]:
        one = msgspec.structs.replace(row(), memory=MemoryUsage(size=512 * MIB, **memory))
        return [(found.code, found.effect) for found in explain(vm(), usage(one))]

    assert why(granted=256 * MIB, guest_used=230 * MIB) == [("balloon", "limits")]
    assert why(granted=256 * MIB, guest_used=50 * MIB) == [("balloon", "slows"), ("satisfied", "fine")]
    assert why(granted=256 * MIB) == [("balloon", "slows"), ("satisfied", "fine")]
    assert why(granted=512 * MIB, guest_used=500 * MIB) == [("satisfied", "fine")], "it has all of it"


def test_a_host_without_memory() -> None:
    found = explain(vm(), usage(row(), memory_available=100 * MIB))
    assert codes(found) == ["host-memory", "satisfied"]
    assert "100M of 8G" in found[0].message


@pytest.mark.parametrize(
    ("phase", "code"),
    [
        (Phase.PAUSED, "paused"),
        (Phase.STOPPED, "not-running"),
        (Phase.PENDING, "not-running"),
        (Phase.ERROR, "not-running"),
        (Phase.UNRESPONSIVE, "unresponsive"),
        (Phase.STARTING, "starting"),
    ],
)
def test_what_does_not_run_is_told_first_with_its_reason(phase: Phase, code: str) -> None:
    found = explain(vm(phase=phase, reason="a reason"), usage())
    assert found[0].code == code
    assert found[0].message.endswith("a reason")


def test_without_measurements_nothing_is_guessed() -> None:
    blind = row(used=None, entitled=None, granted=None, wanted=None, wait=None, throttled=None)
    assert codes(explain(vm(), usage(blind, period_s=None, idle=None, foreign=None))) == ["unmeasured"]
    assert summary(vm(), usage(blind)) == "web is running"
    assert codes(explain(vm(), usage())) == ["unmeasured"], "its process is not seen here yet"


def test_failures_before_are_told() -> None:
    found = explain(vm(failures=2), usage(row()))
    assert codes(found) == ["failing", "satisfied"]
    assert "2 times in a row" in found[0].message


def test_the_summary_says_what_it_does() -> None:
    assert summary(vm(), usage(row(**HUNGRY))) == (
        "web is running: it used 0.50 of 1 CPU, and waited for 0.50 over the last 15 s"
    )


def test_the_answer_in_words() -> None:
    found = explain(vm(limit=0.2), usage(row(limit=0.2, used=0.2, throttled=0.78, wait=0.8)))
    body = {
        "summary": "web is running", "host": "here", "findings": msgspec.to_builtins(found), "need": {"memory": MIB, "cpus": 1},
        "events": [{"at": 0.0, "reason": "CpuThrottled", "message": "its limit", "severity": "warning"}],
        "hosts": [{"host": "here", "fits": False, "reason": "memory: needs 2", "filter": "memory", "score": 0.0}],
    }  # fmt: skip
    lines = in_words(body, hosts=True).splitlines()
    assert lines[:3] == [
        "web is running",
        "  limits  its own cpu.limit of 0.2 cores holds it back: it used 0.20, and was held for 0.78 cores' time more",
        "          hint: corral vm set web cpu.limit=none",
    ]
    assert any("CpuThrottled" in line for line in lines)
    assert lines[-1].split() == ["here", "no", "memory:", "needs", "2"]
    assert "memory:" not in in_words(body, hosts=False)
