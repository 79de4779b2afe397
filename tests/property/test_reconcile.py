"""Deciding about a VM: total, safe, and it comes to rest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corral.agent.failure import Cause
from corral.agent.reconcile import OFF_STATES, TABLE, Decision, Do, Gate, GuestView, Seen, Wish, decide
from corral.agent.settings import Settings
from corral.engine.protocol import Exit, State
from corral.model import Meta, OnHang, Phase, Power, Restart, Vm, VmSpec, VmStatus

SETTINGS = Settings()
NOW = 1_700_000_000.0

seconds = st.none() | st.floats(0, 1000)
vms = st.builds(
    Vm,
    meta=st.builds(
        Meta, id=st.just("id"), name=st.just("web"), generation=st.integers(1, 3), deleted=st.none() | st.just(NOW)
    ),
    spec=st.builds(
        VmSpec, image=st.just("i"), restart=st.sampled_from(Restart), on_hang=st.sampled_from(OnHang), power=st.sampled_from(Power), boots=st.integers(1, 3), resets=st.integers(0, 2),
        force=st.booleans(),
    ),
    status=st.builds(
        VmStatus, phase=st.sampled_from(Phase), boots=st.integers(0, 3), resets=st.integers(0, 2),
        observed=st.integers(0, 3), cause=st.sampled_from(("", *Cause)), guest=st.sampled_from(("", "corral-guest")), epoch=st.integers(0, 2), failures=st.integers(0, 3),
        retry_at=st.none() | st.floats(NOW - 100, NOW + 1000), host=st.just("here"),
    ),
)  # fmt: skip
sightings = st.builds(
    Seen,
    state=st.sampled_from(State),
    exit=st.none() | st.builds(Exit, asked=st.booleans(), code=st.none() | st.integers(0, 2), reason=st.text(max_size=9)),
    epoch=st.integers(0, 2),
    guest=st.builds(
        GuestView, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.floats(0, 99),
        st.sampled_from(("", "not itself yet")), st.floats(0, 99), st.booleans(),
    ),
    gate=st.builds(Gate, st.sampled_from(("", "no room")), st.booleans(), st.none()),
    asked_s=seconds, repeat_s=seconds, running_s=seconds, ending_s=seconds, stalled_s=seconds,
    fault=st.sampled_from(("disk-full", "disk-error")), disk_error_s=seconds, silent_s=seconds, oom=st.booleans(),
)  # fmt: skip


def test_every_row_of_the_table_that_can_be_asked_is_there() -> None:
    wanted = {(w, s) for w in Wish for s in State if not (w is Wish.CYCLE and s in OFF_STATES)}
    assert set(TABLE) == wanted


@given(vms, sightings)
def test_there_is_always_an_answer_and_it_is_safe(vm: Vm, seen: Seen) -> None:
    decision = decide(vm, seen, NOW, SETTINGS)
    wanted_on = vm.meta.deleted is None and vm.spec.power is not Power.STOPPED
    if decision.do is Do.START:
        assert wanted_on
        assert seen.state is State.ABSENT, "never a second process"
    if decision.do is Do.TEARDOWN:
        assert vm.meta.deleted is not None
        assert seen.state in OFF_STATES, "disks are removed only when nobody writes to them"
    if decision.do is Do.KILL:
        allowed = vm.meta.deleted is not None or vm.spec.force or gave_up(vm) or seen.state in (
            State.CREATED, State.SHUTDOWN, State.PANICKED,
        )  # fmt: skip
        assert allowed, "nobody asked for the power to be cut"
    if decision.do is Do.FORGET:
        assert seen.state in OFF_STATES
    if seen.epoch > vm.status.epoch and seen.state is not State.ABSENT:
        assert decision.do is Do.QUARANTINE
    if decision.do is Do.REST and decision.phase is Phase.RUNNING and decision.sure:
        assert seen.state is State.RUNNING


def gave_up(vm: Vm) -> bool:
    """It is written down that it hung, and that this was its end."""
    return vm.status.cause in ("guest-hang", "qemu-silent") and vm.status.phase in (Phase.PENDING, Phase.ERROR)


@given(vms, sightings)
def test_a_silent_hypervisor_is_never_killed_on_a_guess(vm: Vm, seen: Seen) -> None:
    seen = seen._replace(state=State.UNRESPONSIVE, epoch=0)
    decision = decide(vm, seen, NOW, SETTINGS)
    if decision.do is Do.KILL:
        assert vm.spec.force or vm.meta.deleted is not None or gave_up(vm)
    elif decision.do is not Do.REST:
        assert decision.do is Do.END
        assert seen.silent_s is not None
        assert seen.silent_s >= SETTINGS.silent_patience_s


@given(vms, sightings)
def test_a_running_guest_is_given_up_only_when_it_answered_before_and_its_owner_agrees(vm: Vm, seen: Seen) -> None:
    seen = seen._replace(state=State.RUNNING, epoch=0)
    if decide(vm, seen, NOW, SETTINGS).do is Do.END:
        assert seen.guest.hung
        assert seen.guest.hung_s >= SETTINGS.hang_patience_s
        assert not seen.guest.gone
        assert not seen.guest.booting
        assert (vm.spec.on_hang, vm.status.guest) == (OnHang.RESTART, "corral-guest")
        assert vm.spec.restart is not Restart.NEVER


@given(vms, sightings)
def test_every_end_has_a_name(vm: Vm, seen: Seen) -> None:
    decision = decide(vm, seen, NOW, SETTINGS)
    assert decision.cause in ("", *Cause)
    if decision.do is Do.END:
        assert decision.cause
        assert decision.reason


@given(vms, sightings)
def test_rest_in_a_passing_phase_always_comes_back_or_waits_for_an_event(vm: Vm, seen: Seen) -> None:
    decision: Decision = decide(vm, seen, NOW, SETTINGS)
    if decision.again is not None:
        assert 0 <= decision.again <= 1000
