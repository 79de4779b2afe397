"""What a VM has of each resource now, as a table: set, entitled, granted, used."""

from __future__ import annotations

from corral.cli.failures import clean
from corral.cli.output import Object, table
from corral.units import format_size

ROOT, SEED = "root", "seed"
"""Drives: the disk of its own, and the small one that it is told its name by."""


def resources(vm: Object, measured: Object) -> list[str]:
    """What is set for each resource, and what it is entitled to, granted and using now; ``-`` for what nobody knows."""
    spec, cpu, memory = vm["spec"], measured["cpu"], measured["memory"]
    waits = f", waits {cpu['wait']:.2f}" if cpu["wait"] else ""
    held = f", held back {cpu['throttled']:.2f}" if cpu["throttled"] else ""
    rows = [
        ["cpu", _cpu_setting(spec["cpu"]), _cores(cpu["entitled"]), _cores(cpu["granted"]),
         _cores(cpu["used"]) + waits + held],
        ["memory", _memory_setting(spec["memory"]), format_size(memory["size"]), _size(memory.get("granted")),
         ", ".join(filter(None, (_part(memory.get("guest_used"), "used"), _part(memory["used"], "held")))) or "-"],
    ]  # fmt: skip
    for disk in measured["disks"]:
        if disk["name"] == SEED:
            continue
        setting = spec["disk"] if disk["name"] == ROOT else {}
        limit = _disk_limit(setting)
        rows.append([clean(f"disk {disk['name']}"), _disk_size(setting), limit, limit, _disk_used(disk)])
    for number, nic in enumerate(measured["nics"]):
        setting = spec["nics"][number] if number < len(spec["nics"]) else {}
        limit = f"{format_size(setting['rate'])}/s" if setting.get("rate") else "no limit"
        used = "-" if nic["receive_rate"] is None else f"{_rate(nic['receive_rate'])} in, {_rate(nic['send_rate'])} out"
        rows.append([f"nic {number}", clean(setting.get("network", "-")), limit, limit, used])
    return table(["RESOURCE", "SETTING", "ENTITLED", "GRANTED", "USED"], rows).splitlines()


def _cpu_setting(cpu: Object) -> str:
    parts = [f"{cpu['count']} CPU", f"weight {cpu['weight']}"]
    parts += [f"limit {cpu['limit']:g}"] if cpu["limit"] is not None else []
    parts += [f"reserve {cpu['reserve']:g}"] if cpu["reserve"] else []
    parts += [f"burst {cpu['burst']:g}s"] if cpu.get("burst") else []
    return ", ".join(parts)


def _memory_setting(memory: Object) -> str:
    reserve = memory.get("reserve")
    return format_size(memory["size"]) + (f", reserve {format_size(reserve)}" if reserve else "")


def _disk_size(disk: Object) -> str:
    return format_size(disk["size"]) if disk.get("size") else "-"


def _disk_limit(disk: Object) -> str:
    parts = [f"{disk['iops']} iops"] if disk.get("iops") else []
    parts += [f"{format_size(disk['bandwidth'])}/s"] if disk.get("bandwidth") else []
    return ", ".join(parts) or "no limit"


def _disk_used(disk: Object) -> str:
    failed = f", {disk['failed']} failed" if disk["failed"] else ""
    if disk["iops"] is None:
        return f"{format_size(disk['read'])} read, {format_size(disk['written'])} written so far{failed}"
    return f"{_rate(disk['read_rate'])} read, {_rate(disk['write_rate'])} written, {disk['iops']:.0f} iops{failed}"


def _rate(value: float) -> str:
    return f"{format_size(round(value))}/s"


def _cores(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _part(value: int | None, what: str) -> str:
    return "" if value is None else f"{format_size(value)} {what}"
