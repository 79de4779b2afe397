"""Objects in words: the summary that ``info`` and ``launch`` print."""

from __future__ import annotations

from corral.cli.failures import clean
from corral.cli.output import Object, outline, shown
from corral.cli.resources import resources
from corral.model.kinds import KINDS
from corral.units import format_duration, format_size

_TIMES = (
    "meta.created", "meta.deleted", "status.started_at", "status.retry_at", "status.started", "status.ended",
    "status.seen_at", "spec.at",
)  # fmt: skip
_SIZES = (
    "spec.memory.size", "spec.memory.reserve", "spec.memory_budget", "spec.disk.size", "spec.disk.bandwidth",
    "spec.disk.bandwidth_burst", "spec.size", "spec.memory", "spec.disk", "spec.disk_bandwidth",
    "spec.disk_bandwidth_burst", "status.memory", "status.size", "status.memory_reserved", "status.disk_free",
    "status.virtual_size", "status.min_memory", "status.used",
    "status.received", "status.total",
)  # fmt: skip


def every_field(item: Object) -> str:
    """All fields that hold something, times and sizes as people read them."""
    kind = KINDS[item["kind"]]
    forms = dict.fromkeys(_TIMES, "time") | dict.fromkeys(_SIZES, "size")
    forms |= {column.path: column.form for column in kind.columns if column.form in ("size", "time")}
    return outline(item, forms)


def vm_summary(vm: Object, measured: Object | None = None) -> str:
    """A VM in a few lines: what it is, how it is, how to get in; ``measured``: its row of the usage."""
    meta, spec, status = vm["meta"], vm["spec"], vm["status"]
    rows = [
        ("name", meta["name"]),
        ("project", meta["project"] if meta.get("project") != "default" else ""),
        ("phase", status["phase"] + (f" ({status['reason']})" if status.get("reason") else "")),
        ("image", spec["image"]),
        ("flavor", spec.get("flavor") or ""),
        ("cpus", f"{spec['cpu']['count']}" + (f", {_accelerator(status)}" if status.get("accelerator") else "")),
        ("memory", format_size(spec["memory"]["size"])),
        ("disk", _disk(spec.get("disk") or {})),
        ("start", start_of(status)),
        ("host", status.get("host", "")),
        ("pid", shown(status.get("pid"))),
        ("started", shown(status.get("started_at"), "time")),
        ("addresses", shown(status.get("addresses"))),
        ("ports", ", ".join(_port(p) for p in status.get("ports", []))),
        ("guest agent", status.get("guest", "")),
        ("cause", status.get("cause", "")),
        ("failures", f"{status['failures']} in a row" if status.get("failures") else ""),
        ("next start", shown(status.get("retry_at"), "time")),
        ("labels", ", ".join(f"{k}={v}" for k, v in sorted((meta.get("labels") or {}).items()))),
        ("id", meta["id"]),
        ("created", shown(meta["created"], "time")),
    ]
    lines = [f"{title + ':':13}{clean(text)}" for title, text in rows if text]
    if measured is not None:
        lines += ["", *resources(vm, measured)]
    return "\n".join(lines + (["", *ways_in(vm)] if status["phase"] == "running" else []))


def _disk(disk: Object) -> str:
    """Its size and limits: ``5G, at most 500 iops (burst 2000 iops), 10M/s``."""
    limits = []
    for field, unit in (("iops", " iops"), ("bandwidth", "/s")):
        if disk.get(field):
            steady, burst = (_rate(disk.get(f"{field}{more}"), unit) for more in ("", "_burst"))
            limits.append(steady + (f" (burst {burst})" if burst else ""))
    size = format_size(disk["size"]) if disk.get("size") else ""
    return ", ".join(filter(None, (size, f"at most {', '.join(limits)}" if limits else "")))


def _rate(value: int | None, unit: str) -> str:
    return "" if not value else f"{format_size(value) if unit == '/s' else value}{unit}"


def start_of(status: Object) -> str:
    """How a VM came up: forked from what, or booted and why, and how long that took."""
    start = (status.get("details") or {}).get("start") or {}
    timings = start.get("timings") or {}
    took = max(timings.values(), default=None)
    after = f" in {format_duration(took)}" if took is not None else ""
    if start.get("how") == "fork":
        pause = start.get("pause_s")
        parent = f"VM {start['source']}" if start.get("source") else f"template {start.get('template', '')}"
        still = f"; that stood still for {1000 * pause:.0f} ms" if pause is not None else ""
        ahead = ", made ahead" if start.get("warm") else ""
        return f"forked from {parent}{ahead}{after}{still}"
    return f"booted{after}: {start['why']}" if start.get("why") else ""


def ways_in(vm: Object) -> list[str]:
    """The commands that lead into a running VM, and where its published ports are."""
    name, status = scoped_name(vm), vm["status"]
    lines = []
    if status.get("guest"):
        lines.append(f"  corral exec {name} -- sh")
    if ssh_port(vm) is not None:
        lines.append(f"  corral ssh {name}")
    lines.append(f"  corral console {name}")
    lines += [f"  {_port(p)}" for p in status.get("ports", []) if p.get("purpose") != "ssh"]
    return lines


def scoped_name(vm: Object) -> str:
    """The name to type: ``PROJECT/NAME`` outside the default project."""
    meta = vm["meta"]
    return clean(meta["name"] if meta.get("project", "default") == "default" else f"{meta['project']}/{meta['name']}")


def ssh_port(vm: Object) -> int | None:
    """The host's port that leads to the guest's sshd; None without one."""
    ports = [p["host"] for p in vm["status"].get("ports", []) if p["guest"] == 22 and p.get("protocol") == "tcp"]
    return int(ports[0]) if ports else None


def launched(vm: Object) -> str:
    """One line about a VM that has just come up."""
    spec, status = vm["spec"], vm["status"]
    what = f"{spec['image']}, {spec['cpu']['count']} CPU, {format_size(spec['memory']['size'])}"
    how = f", {_accelerator(status)}" if status.get("accelerator") else ""
    start = (status.get("details") or {}).get("start") or {}
    forked = f", forked from {start['source'] or start['template']}" if start.get("how") == "fork" else ""
    return f"{scoped_name(vm)} is {status['phase']} ({clean(what)}{how}{clean(forked)})"


def _accelerator(status: Object) -> str:
    return {"tcg": "software emulation (tcg)", "kvm": "hardware-assisted (kvm)"}.get(
        status["accelerator"], clean(status["accelerator"])
    )


def _port(forward: Object) -> str:
    address = forward.get("address") or "127.0.0.1"
    protocol = "" if forward.get("protocol", "tcp") == "tcp" else f"/{forward['protocol']}"
    purpose = " (ssh)" if forward.get("purpose") == "ssh" else ""
    return f"{address}:{forward['host']} → port {forward['guest']}{protocol}{purpose}"
