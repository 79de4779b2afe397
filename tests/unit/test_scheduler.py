"""Admission with numbers, the restart policy, suspicion."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corral.model import Host, HostSpec, HostStatus, Memory, Meta, Power, Restart, Vm, VmSpec, VmStatus
from corral.scheduler.place import Need, Room, choose, explain, judge, need_of, rooms, sentence
from corral.scheduler.restart import POISON, Follow, after_end, backoff
from corral.scheduler.suspicion import Suspicion
from corral.units import GIB, MIB


def room(name: str = "big", **fields: object) -> Room:
    return Room(**{"host": name, "arch": "x86_64", "memory": 4 * GIB, "overhead": 100 * MIB, **fields})  # type: ignore[arg-type]


def vm(name: str, memory: int, host: str = "big", power: Power = Power.RUNNING) -> Vm:
    return Vm(
        meta=Meta(id=name, name=name), spec=VmSpec(image="i", memory=Memory(size=memory), power=power),
        status=VmStatus(host=host),
    )  # fmt: skip


def test_a_refusal_says_the_numbers() -> None:
    verdict = judge(Need(memory=2 * GIB), room(used=int(2.5 * GIB), vms=1))
    assert not verdict.fits
    assert verdict.reason == "memory: needs 2.1 GiB, 1.4 GiB free"


def test_the_first_filter_that_refuses_is_told() -> None:
    need = Need(memory=100 * GIB, arch="aarch64", host="other")
    assert judge(need, room(phase="down")).filter == "ready"
    assert judge(need, room(cordoned=True)).filter == "cordon"
    assert judge(need, room()).reason == "storage: the image is on other"
    assert judge(need._replace(host=""), room()).reason == "arch: needs aarch64, the host is x86_64"
    assert judge(Need(memory=1), room(disk_free=MIB)).filter == "disk"
    assert judge(Need(memory=1), room(disk_free=None)).fits


def test_the_emptiest_host_is_chosen_and_ties_go_by_name() -> None:
    hosts = [room("b"), room("a"), room("full", used=3 * GIB, vms=1)]
    host, table = choose(Need(memory=GIB), hosts)
    assert host == "a"
    assert [v.host for v in table] == ["a", "b", "full"]
    assert [v.fits for v in table] == [True, True, False]


def test_nothing_fits_is_a_sentence_with_every_reason() -> None:
    host, table = choose(Need(memory=8 * GIB), [room("a"), room("b", cordoned=True)])
    assert host is None
    assert sentence(table) == (
        "no host can take it: a: memory: needs 8.1 GiB, 4.0 GiB free; b: cordon: the host is cordoned"
    )
    assert sentence([]) == "no host can take it: there is no host"


def test_rooms_count_what_is_to_run_with_its_overhead() -> None:
    host = Host(
        meta=Meta(id="h", name="big"), spec=HostSpec(),
        status=HostStatus(phase="ready", arch="x86_64", cpus=2, memory=4 * GIB, memory_reserved=GIB, overhead=50 * MIB),
    )  # fmt: skip
    vms = [
        vm("a", GIB),
        vm("b", GIB, power=Power.STOPPED),
        vm("c", GIB, host="other"),
        vm("d", GIB, power=Power.PAUSED),
    ]
    (only,) = rooms([host], vms)
    assert (only.used, only.vms, only.free) == (2 * GIB, 2, GIB - 100 * MIB)
    (without,) = rooms([host], vms, without="a")
    assert without.free == 2 * GIB - 50 * MIB
    assert need_of(vms[0], arch="x86_64").memory == GIB


def test_a_budget_bounds_what_vms_take_and_is_exceeded_only_where_the_host_says_how_far() -> None:
    tight = room(budget=GIB, overhead=0)
    assert judge(Need(memory=GIB + MIB), tight).reason == "memory: needs 1.0 GiB, 1.0 GiB free"
    assert judge(Need(memory=GIB), tight).fits
    loose = tight._replace(overcommit=1.5, used=GIB, vms=4)
    assert judge(Need(memory=512 * MIB), loose).fits
    assert not judge(Need(memory=513 * MIB), loose).fits
    assert room(budget=100 * GIB).capacity == 4 * GIB, "a budget makes no memory"


def test_what_is_reserved_always_fits_whatever_is_overcommitted() -> None:
    loose = room(budget=GIB, overcommit=3.0, overhead=50 * MIB, used=GIB, promised=700 * MIB, vms=2)
    assert judge(Need(memory=GIB), loose).fits
    refused = judge(Need(memory=GIB, reserve=400 * MIB), loose)
    assert refused.reason == "memory: reserves 450 MiB, 224 MiB not reserved"


def test_rooms_count_reservations_of_what_is_to_run() -> None:
    host = Host(
        meta=Meta(id="h", name="big"), spec=HostSpec(memory_budget=3 * GIB, memory_overcommit=2.0),
        status=HostStatus(phase="ready", memory=4 * GIB, overhead=MIB),
    )  # fmt: skip
    reserved = Vm(
        meta=Meta(id="r", name="r"), spec=VmSpec(image="i", memory=Memory(size=2 * GIB, reserve=GIB)),
        status=VmStatus(host="big"),
    )  # fmt: skip
    (only,) = rooms([host], [reserved, vm("a", GIB)])
    assert (only.used, only.promised, only.vms) == (3 * GIB, GIB, 2)
    assert (only.capacity, only.free, only.unreserved) == (3 * GIB, 3 * GIB - 2 * MIB, 2 * GIB - 2 * MIB)
    assert need_of(reserved).reserve == GIB


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64)), min_size=1, max_size=8), st.integers(1, 64))
def test_what_is_chosen_fits(hosts: list[tuple[int, int]], wanted: int) -> None:
    """Safety: never overcommitted. Liveness: chosen whenever somebody fits. The order of hosts does not matter."""
    made = [room(f"h{n}", memory=m * GIB, used=u * GIB, vms=1, overhead=0) for n, (m, u) in enumerate(hosts)]
    need = Need(memory=wanted * GIB)
    host, table = choose(need, made)
    assert (host is not None) == any(m - u >= wanted for m, u in hosts)
    if host is not None:
        chosen = next(r for r in made if r.host == host)
        assert chosen.used + need.memory <= chosen.memory
    assert explain(need, reversed(made)) == table


def test_backoff_doubles_up_to_five_minutes() -> None:
    assert [backoff(n) for n in (1, 2, 3, 4, 5, 6, 60)] == [10, 20, 40, 80, 160, 300, 300]


def test_a_failure_is_restarted_three_are_poison_and_health_forgets() -> None:
    first = after_end(Restart.ON_FAILURE, clean=False, failures=0, ran_s=5)
    assert first == (Follow.AGAIN, 1, 10.0)
    assert after_end(Restart.ALWAYS, clean=False, failures=POISON - 1, ran_s=5).follow is Follow.ERROR
    assert after_end(Restart.ON_FAILURE, clean=False, failures=POISON - 1, ran_s=600) == (Follow.AGAIN, 1, 10.0)
    assert after_end(Restart.NEVER, clean=False, failures=0, ran_s=5).follow is Follow.ERROR


def test_a_clean_power_off_stays_off_unless_always() -> None:
    assert after_end(Restart.ON_FAILURE, clean=True, failures=2, ran_s=5) == (Follow.STOPPED, 0, 0.0)
    assert after_end(Restart.NEVER, clean=True, failures=0, ran_s=5).follow is Follow.STOPPED
    assert after_end(Restart.ALWAYS, clean=True, failures=9, ran_s=5) == (Follow.AGAIN, 10, 300.0)


def test_suspicion_grows_by_a_fraction_and_one_answer_clears_it() -> None:
    s = Suspicion(limit=4)
    levels = []
    for _ in range(5):
        s = s.beat(False)
        levels.append((s.level, s.hung))
    assert levels == [(0.25, False), (0.5, False), (0.75, False), (1.0, True), (1.0, True)]
    assert not s.beat(True).hung
    assert s.beat(True).level == 0
