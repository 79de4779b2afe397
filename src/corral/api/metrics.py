"""``/metrics`` in Prometheus' format: what is measured and recorded, read anew for each scrape, and requests counted.

The only file that knows prometheus_client; its registry is our own. Every figure is a row of a table: its name, what it
means, and where it comes from; ``docs/reference/metrics.md`` lists them, and a test holds the two together. A figure
that is not known has no sample: never a 0 in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from corral.api.kinds import success
from corral.api.live import Live
from corral.api.problems import documented
from corral.api.service import Service
from corral.model import Phase, Task, TaskState, Template, Vm
from corral.model.usage import Usage, VmUsage
from corral.version import __version__

OPENMETRICS = "application/openmetrics-text"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Seconds. Reads take a millisecond, writes some, a guest's answer through us up to a few seconds."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
"""Others are counted together: what a client makes up may not become a label."""


def _total(vm: VmUsage, field: str) -> float | None:
    return None if vm.cpu.total is None else float(getattr(vm.cpu.total, field))


class Row(NamedTuple):
    """One figure. What only grows has a name that ends in ``_total``. ``read``: None where it is not known."""

    name: str
    help: str
    read: Callable[[Any], float | int | None]

    def family(self, labels: Sequence[str]) -> Any:
        kind = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        return kind(self.name, self.help, labels=labels)


R = Row
HOST: tuple[Row, ...] = (
    R("corral_host_cores", "Cores that VMs may use.", lambda h: h.cores),
    R("corral_host_memory_bytes", "Memory of the host.", lambda h: h.memory),
    R("corral_host_memory_available_bytes", "Memory that can still be used.", lambda h: h.memory_available),
    R("corral_host_idle_cores", "Cores without work over the governor's last period.", lambda h: h.idle),
    R("corral_host_foreign_cores", "Cores used by what is no VM.", lambda h: h.foreign),
    R("corral_host_shares_enforced", "1 where shares of CPU time can be enforced.", lambda h: int(h.shares)),
    R("corral_governor_up", "1 while the governor reports.", lambda h: int(bool(h.mode))),
    R("corral_governor_cores", "Cores that dividing CPU time costs.", lambda h: h.governor),
    R("corral_governor_steering", "1 while threads are moved between cores.", lambda h: int(h.steering)),
)  # fmt: skip
PROJECT: tuple[Row, ...] = (
    R("corral_project_vms", "VMs that have a process.", lambda p: p.vms),
    R("corral_project_cpu_weight", "Weight against other projects.", lambda p: p.weight),
    R("corral_project_cpu_limit_cores", "Cores that its VMs get together at most.", lambda p: p.limit),
    R("corral_project_cpu_reserve_cores", "Cores that its VMs get whenever they want them.", lambda p: p.reserve),
    R("corral_project_cpu_entitled_cores", "Cores that its VMs should have.", lambda p: p.entitled),
    R("corral_project_cpu_granted_cores", "Cores that its VMs can count on.", lambda p: p.granted),
    R("corral_project_cpu_used_cores", "Cores that its VMs used.", lambda p: p.used),
    R("corral_project_memory_bytes", "Memory that its guests have.", lambda p: p.memory_size),
    R("corral_project_memory_held_bytes", "Memory of the host that its QEMUs hold.", lambda p: p.memory_used),
)  # fmt: skip
VM: tuple[Row, ...] = (
    R("corral_vm_cpu_weight", "Weight in its project.", lambda v: v.cpu.weight),
    R("corral_vm_cpu_limit_cores", "Cores that it gets at most: its limit, or its CPUs.", lambda v: v.cpu.limit),
    R("corral_vm_cpu_reserve_cores", "Cores that it gets whenever it wants them.", lambda v: v.cpu.reserve),
    R("corral_vm_cpu_entitled_cores", "Cores that it should have now.", lambda v: v.cpu.entitled),
    R("corral_vm_cpu_granted_cores", "Cores that it can count on now.", lambda v: v.cpu.granted),
    R("corral_vm_cpu_wanted_cores", "Cores that it would use if it had the host to itself.", lambda v: v.cpu.wanted),
    R("corral_vm_cpu_credit_seconds", "CPU time that it is owed; below 0: had too much.", lambda v: v.cpu.credit),
    R("corral_vm_cpu_saved_seconds", "CPU time saved up for bursts.", lambda v: v.cpu.saved),
    R("corral_vm_cpu_seconds_total", "CPU time used.", lambda v: _total(v, "used")),
    R("corral_vm_cpu_entitled_seconds_total", "CPU time it should have had.", lambda v: _total(v, "entitled")),
    R("corral_vm_cpu_wait_seconds_total", "Time threads were ready and did not run.", lambda v: _total(v, "wait")),
    R("corral_vm_cpu_throttled_seconds_total", "CPU time held back by a limit.", lambda v: _total(v, "throttled")),
    R("corral_vm_memory_bytes", "Memory of the guest.", lambda v: v.memory.size),
    R("corral_vm_memory_reserve_bytes", "Memory that stays its own.", lambda v: v.memory.reserve),
    R("corral_vm_memory_granted_bytes", "Memory that the guest may use now.", lambda v: v.memory.granted),
    R("corral_vm_memory_guest_used_bytes", "Memory that the guest uses, where asked.", lambda v: v.memory.guest_used),
    R("corral_vm_memory_held_bytes", "Memory of the host that its QEMU holds.", lambda v: v.memory.used),
)  # fmt: skip
DISK: tuple[Row, ...] = (
    R("corral_vm_disk_read_bytes_total", "Bytes read by the guest.", lambda d: d.read),
    R("corral_vm_disk_written_bytes_total", "Bytes written by the guest.", lambda d: d.written),
    R("corral_vm_disk_reads_total", "Reads of the guest.", lambda d: d.reads),
    R("corral_vm_disk_writes_total", "Writes of the guest.", lambda d: d.writes),
    R("corral_vm_disk_flushes_total", "Flushes of the guest.", lambda d: d.flushes),
    R("corral_vm_disk_failures_total", "Operations that the host could not do.", lambda d: d.failed),
)
NIC: tuple[Row, ...] = (
    R("corral_vm_nic_received_bytes_total", "Bytes that came to the guest.", lambda n: n.received),
    R("corral_vm_nic_sent_bytes_total", "Bytes that the guest sent.", lambda n: n.sent),
)
RECORD: tuple[Row, ...] = (
    R("corral_vm_boots_total", "Boots done.", lambda vm: vm.status.boots),
    R("corral_vm_failures", "Unasked ends in a row.", lambda vm: vm.status.failures),
)
TEMPLATE: tuple[Row, ...] = (
    R("corral_template_forks", "VMs forked from it that run.", lambda t: t.status.forks),
    R("corral_template_warm", "Forks of it that are made already and wait for a launch.", lambda t: t.status.warm),
    R("corral_template_memory_bytes", "Memory of the host that it holds, once for all.", lambda t: t.status.memory),
)


class Snapshot(NamedTuple):
    """Everything at the moment of a scrape."""

    usage: Usage
    vms: Sequence[Vm]
    tasks: Sequence[Task]
    revision: int
    templates: Sequence[Template] = ()


class Metrics:
    """Requests counted, and the text of a scrape."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, of no use
        self._registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        Gauge("corral_build_info", "Version of the daemon; always 1.", ["version"], registry=registry).labels(
            __version__
        ).set(1)
        self._requests = Counter(
            "corral_api_requests", "Requests answered.", ["method", "route", "code"], registry=registry
        )
        self._seconds = Histogram(
            "corral_api_request_seconds", "Time until an answer began.", ["method", "route"], buckets=BUCKETS_S,
            registry=registry,
        )  # fmt: skip

    def answered(self, method: str, route: str, code: int, seconds: float) -> None:
        """One request. ``route``: the template of its path, empty for one that we do not have."""
        method, route = (method if method in METHODS else "other"), route or "other"
        self._requests.labels(method, route, code).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self, seen: Snapshot, accept: str = "") -> tuple[bytes, str]:
        """The scrape and its media type: Prometheus' text, or OpenMetrics for who asks for it."""
        encode, media = choose_encoder(OPENMETRICS if OPENMETRICS in accept else "")
        return encode(_Everything(self._registry, seen)), media


class _Everything:
    """What is counted and what is seen, as one collector."""

    def __init__(self, registry: CollectorRegistry, seen: Snapshot) -> None:
        self._registry, self._seen = registry, seen

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield from families(self._seen)


def families(seen: Snapshot) -> Iterator[Metric]:
    """All that is seen."""
    usage = seen.usage
    host = [((usage.host.name,), usage.host)]
    yield from _table(HOST, ("host",), host)
    yield from _table(PROJECT, ("project",), [((one.name,), one) for one in usage.projects])
    yield from _table(VM, ("project", "vm"), [((one.project, one.name), one) for one in usage.vms])
    disks = [((one.project, one.name, disk.name), disk) for one in usage.vms for disk in one.disks]
    yield from _table(DISK, ("project", "vm", "disk"), disks)
    nics = [((one.project, one.name, nic.name), nic) for one in usage.vms for nic in one.nics]
    yield from _table(NIC, ("project", "vm", "nic"), nics)
    yield from _table(RECORD, ("project", "vm"), [((vm.meta.project, vm.meta.name), vm) for vm in seen.vms])
    templates = [((one.meta.project, one.meta.name), one) for one in seen.templates]
    yield from _table(TEMPLATE, ("project", "template"), templates)
    yield from _records(seen)


Labelled = Sequence[tuple[tuple[str, ...], Any]]
"""Values of labels, and the thing that has them."""


def _table(rows: Iterable[Row], labels: Sequence[str], things: Labelled) -> Iterator[Metric]:
    for row in rows:
        family = row.family(labels)
        for names, thing in things:
            value = row.read(thing)
            if value is not None:
                family.add_metric(names, value)
        yield family


def _records(seen: Snapshot) -> Iterator[Metric]:
    """What the store says: VMs, whether they run or not, tasks, its revision."""
    info = GaugeMetricFamily(
        "corral_vm_info", "What a VM is; always 1.", labels=("project", "vm", "id", "host", "image", "accelerator")
    )
    phase = GaugeMetricFamily("corral_vm_phase", "1 for the phase that a VM is in.", labels=("project", "vm", "phase"))
    count = dict.fromkeys(((project, str(one)) for project in {vm.meta.project for vm in seen.vms} for one in Phase), 0)
    for vm in seen.vms:
        meta, status = vm.meta, vm.status
        info.add_metric((meta.project, meta.name, meta.id, status.host, vm.spec.image, status.accelerator), 1)
        phase.add_metric((meta.project, meta.name, str(status.phase)), 1)
        count[meta.project, str(status.phase)] += 1
    vms = GaugeMetricFamily("corral_vms", "VMs by phase.", labels=("project", "phase"))
    for names, number in sorted(count.items()):
        vms.add_metric(names, number)
    states = dict.fromkeys(TaskState, 0)
    for task in seen.tasks:
        states[task.status.state] += 1
    tasks = GaugeMetricFamily("corral_tasks", "Tasks that are remembered, by state.", labels=("state",))
    for state, number in states.items():
        tasks.add_metric((str(state),), number)
    revision = GaugeMetricFamily("corral_store_revision", "Revision of the store: rises with every change.")
    revision.add_metric((), seen.revision)
    yield from (info, phase, vms, tasks, revision)


def route(service: Service, live: Live, metrics: Metrics) -> HTTPRouteHandler:
    """``GET /metrics``."""

    @get(
        "/metrics", tags=["platform"], summary="Figures for Prometheus", operation_id="metrics",
        responses=success(str, "Prometheus' text format, or OpenMetrics.", media="text/plain") | documented(),
    )  # fmt: skip
    async def handler(request: Request[Any, Any, Any]) -> Response[bytes]:
        vms, tasks = await service.objects.list(Vm), await service.objects.list(Task)
        templates = await service.objects.list(Template)
        seen = Snapshot(await live.usage(), vms.items, tasks.items, tasks.revision, templates.items)
        body, media = metrics.text(seen, request.headers.get("accept", ""))
        return Response(body, media_type=media)

    return handler
