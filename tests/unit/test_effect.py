"""What a change of a VM's spec means, and the paths that people write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.model import Disk, Nic, VmSpec
from corral.model.effect import LIVE, effects
from corral.model.patch import keys, merge, public
from corral.model.shape import to_tree

SPEC = VmSpec(image="debian", nics=(Nic(mac="52:54:00:00:00:01"), Nic(mac="52:54:00:00:00:02")))


def effect(field: str, **more: Any) -> str:
    (change,) = effects(more.pop("before"), more.pop("after"), **{"runs": True, **more})
    assert change.field == field
    return change.effect


def changed(**fields: Any) -> dict[str, Any]:
    return {"before": to_tree(SPEC), "after": merge(to_tree(SPEC), fields)}


@pytest.mark.parametrize("field", ["iops", "bandwidth", "iops_burst", "bandwidth_burst", "burst_s"])
def test_limits_of_a_disk_hold_at_once_and_its_size_after_a_restart(field: str) -> None:
    assert effect(f"disk.root.{field}", **changed(disk={field: 500})) == "live"
    assert effect("disk.root.size", **changed(disk={"size": 1 << 30})) == "restart"


def test_a_vm_that_does_not_run_has_it_now() -> None:
    assert effect("disk.root.size", **changed(disk={"size": 1 << 30}), runs=False) == "now"


def test_a_field_of_one_card_is_named_by_the_cards_number() -> None:
    tree = to_tree(SPEC)
    cards = [tree["nics"][0], {**tree["nics"][1], "rate": 5}]
    assert effect("nic.1.rate", before=tree, after={**tree, "nics": cards}) == "restart"


def test_what_is_refused_is_impossible_and_says_why() -> None:
    (change,) = effects(**changed(disk={"size": 1}), runs=True, refused={"disk.root.size": "a disk never shrinks"})
    assert (change.effect, change.why) == ("impossible", "a disk never shrinks")


def test_every_live_field_is_one_of_the_specs() -> None:
    tree = to_tree(VmSpec(image="debian", disk=Disk()))
    for field in LIVE:
        place: Any = tree
        for key in keys(field):
            assert key in place, field
            place = place[key]


@pytest.mark.parametrize(
    ("written", "meant", "shown"),
    [
        ("disk.root.iops", ["disk", "iops"], "disk.root.iops"),
        ("disk.iops", ["disk", "iops"], "disk.root.iops"),
        ("spec.disk.size", ["disk", "size"], "disk.root.size"),
        ("nic.0.rate", ["nics", "0", "rate"], "nic.0.rate"),
        ("spec.nics[3].publish[1].host", ["nics", "3", "publish", "1", "host"], "nic.3.publish.1.host"),
        ("cpu.weight", ["cpu", "weight"], "cpu.weight"),
        ("disk", ["disk"], "disk"),
        ("nics", ["nics"], "nics"),
    ],
)
def test_paths(written: str, meant: list[str], shown: str) -> None:
    assert keys(written) == meant
    assert public(written) == shown


trees = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(trees, trees)
def test_merging_a_patch_again_changes_nothing(target: Any, patch: Any) -> None:
    once = merge(target, patch)
    assert merge(once, patch) == once
