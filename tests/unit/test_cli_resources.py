"""What `corral info` says of resources: what is set, entitled, granted and used, at a glance."""

from __future__ import annotations

from typing import Any

from corral.cli.resources import resources

MIB = 1 << 20


def vm(**spec: Any) -> dict[str, Any]:
    cpu = {"count": 2, "weight": 300, "limit": None, "reserve": 0.0, **spec.pop("cpu", {})}
    return {
        "spec": {
            "cpu": cpu,
            "memory": {"size": 512 * MIB},
            "disk": {"size": None},
            "nics": [{"network": "user"}],
            **spec,
        }
    }


def measured(**more: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("entitled", "granted", "used", "wait", "throttled"))
    nothing = {"name": "net0", "received": None, "sent": None, "receive_rate": None, "send_rate": None}
    return {"cpu": unknown, "memory": {"size": 512 * MIB, "used": None}, "disks": [], "nics": [nothing], **more}


def disk(**fields: Any) -> dict[str, Any]:
    rates = {"read_rate": None, "write_rate": None, "iops": None}
    return {"name": "root", "read": 3 * MIB, "written": MIB, "failed": 0, **rates, **fields}


def rows(vm: dict[str, Any], measured: dict[str, Any]) -> dict[str, list[str]]:
    """Resource → the other cells."""
    title, *lines = resources(vm, measured)
    starts = [title.index(word) for word in ("SETTING", "ENTITLED", "GRANTED", "USED")]
    ends = [*starts[1:], None]
    return {
        line[: starts[0]].strip(): [line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines
    }  # fmt: skip


def test_what_nobody_knows_is_a_dash() -> None:
    assert rows(vm(), measured()) == {
        "cpu": ["2 CPU, weight 300", "-", "-", "-"],
        "memory": ["512M", "512M", "-", "-"],
        "nic 0": ["user", "no limit", "no limit", "-"],
    }


def test_cpu_time_with_its_limits_and_what_is_missing() -> None:
    cpu = {"entitled": 0.5, "granted": 0.5, "used": 0.48, "wait": 1.25, "throttled": 0.75}
    found = rows(vm(cpu={"limit": 0.5, "reserve": 0.25, "burst": 30.0}), measured(cpu=cpu))
    assert found["cpu"] == [
        "2 CPU, weight 300, limit 0.5, reserve 0.25, burst 30s", "0.50", "0.50", "0.48, waits 1.25, held back 0.75",
    ]  # fmt: skip


def test_memory_that_was_taken_back_and_what_is_used_of_it() -> None:
    memory = {"size": 512 * MIB, "granted": 384 * MIB, "guest_used": 300 * MIB, "used": 400 * MIB}
    found = rows(vm(memory={"size": 512 * MIB, "reserve": 128 * MIB}), measured(memory=memory))
    assert found["memory"] == ["512M, reserve 128M", "512M", "384M", "300M used, 400M held"]


def test_drives_with_limits_rates_and_failures_but_not_the_seed() -> None:
    limits = {"size": 5 << 30, "iops": 500, "bandwidth": 10 * MIB}
    busy = disk(read_rate=2.0 * MIB, write_rate=1024.0, iops=12.6, failed=3)
    found = rows(vm(disk=limits), measured(disks=[busy, disk(name="seed")]))
    limit = "500 iops, 10M/s"
    assert found["disk root"] == ["5G", limit, limit, "2M/s read, 1K/s written, 13 iops, 3 failed"]
    assert "disk seed" not in found
    first = rows(vm(), measured(disks=[disk()]))
    assert first["disk root"] == ["-", "no limit", "no limit", "3M read, 1M written so far"]


def test_cards_that_are_counted() -> None:
    nic = {"name": "net0", "received": 1, "sent": 1, "receive_rate": 2048.0, "send_rate": 0.0}
    found = rows(vm(nics=[{"network": "lan", "rate": MIB}]), measured(nics=[nic]))
    assert found["nic 0"] == ["lan", "1M/s", "1M/s", "2K/s in, 0B/s out"]
