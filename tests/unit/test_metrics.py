"""``/metrics``: what Prometheus' own parser reads from it, and the page that documents it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from corral.api.app import build
from corral.api.gate import Gate
from corral.api.metrics import Metrics, Snapshot
from corral.api.service import Service
from corral.model import Meta, Phase, Template, TemplateSpec, TemplateStatus, Vm, VmSpec, VmStatus
from corral.model.usage import (
    CpuTotals,
    CpuUsage,
    DiskUsage,
    HostUsage,
    MemoryUsage,
    NicUsage,
    ProjectUsage,
    Usage,
    VmUsage,
)
from corral.runtime import Runtime, SeededRandom
from corral.store.memory import MemoryStore
from corral.store.objects import Objects

from .test_api import FakeLive

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
MIB = 1 << 20


def samples(text: str) -> Samples:
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in read_text(text)
        for one in family.samples
    }  # fmt: skip


def names(text: str) -> set[str]:
    return {
        re.sub(r"_(bucket|count|sum|created)$", "", one.name) for family in read_text(text) for one in family.samples
    }


CPU = CpuUsage(
    weight=300, reserve=0.5, limit=2.0, entitled=1.5, granted=1.25, used=1.0, wanted=2.0, wait=0.5, credit=-0.25,
    saved=3.0, throttled=0.0, total=CpuTotals(entitled=150.0, used=100.0, wait=50.0, throttled=1.0),
)  # fmt: skip
DISK = DiskUsage(name="root", read=7 * MIB, written=MIB, reads=70, writes=10, flushes=3, failed=1, read_rate=5.0)
BUSY = VmUsage(
    id="1", name="busy", project="shop", phase=Phase.RUNNING, accelerator="tcg", cpu=CPU,
    memory=MemoryUsage(size=512 * MIB, used=100 * MIB, reserve=0, granted=384 * MIB, guest_used=200 * MIB), disks=(DISK,),
    nics=(NicUsage(name="net0"), NicUsage(name="net1", received=10, sent=20)),
)  # fmt: skip
NEW = VmUsage(
    id="2", name="new", project="shop", phase=Phase.STARTING, cpu=CpuUsage(weight=100, reserve=0.0, limit=1.0),
    memory=MemoryUsage(size=64 * MIB),
)  # fmt: skip
HOST = HostUsage(
    name="here", cores=2, memory=8 << 30, memory_available=4 << 30, mode="cgroup v1", shares=True, steering=True,
    idle=0.25, foreign=0.75, governor=0.01,
)  # fmt: skip
PROJECT = ProjectUsage(
    name="shop", weight=200, reserve=0.0, limit=1.5, vms=2, entitled=1.5, granted=1.25, used=1.0,
    memory_size=576 * MIB, memory_used=100 * MIB,
)  # fmt: skip
STOPPED = Vm(
    meta=Meta(id="3", name='q"uo\\te\n', project="shop"), spec=VmSpec(image="micro"),
    status=VmStatus(phase=Phase.STOPPED, boots=4, failures=2, host="here", accelerator="kvm"),
)  # fmt: skip
FROZEN = Template(
    meta=Meta(id="4", name="micro-1x96m", project="shop"), spec=TemplateSpec(image="micro"),
    status=TemplateStatus(forks=3, warm=2, memory=96 * MIB),
)  # fmt: skip
SEEN = Snapshot(Usage(at=1.0, host=HOST, vms=(BUSY, NEW), projects=(PROJECT,)), (STOPPED,), (), 77, (FROZEN,))


@pytest.fixture
def text() -> str:
    metrics = Metrics()
    metrics.answered("GET", "/v1/vms", 200, 0.002)
    metrics.answered("BREW", "", 418, 0.002)
    return metrics.text(SEEN)[0].decode()


def test_templates_say_how_many_forks_run_and_how_many_wait(text: str) -> None:
    found = samples(text)
    labels = (("project", "shop"), ("template", "micro-1x96m"))
    assert found["corral_template_forks", labels] == 3
    assert found["corral_template_warm", labels] == 2
    assert found["corral_template_memory_bytes", labels] == 96 * MIB


def test_figures_of_vms_have_units_and_are_counters_where_they_only_grow(text: str) -> None:
    found = samples(text)
    busy = (("project", "shop"), ("vm", "busy"))
    root = (("disk", "root"), *busy)
    assert found["corral_vm_cpu_seconds_total", busy] == 100.0
    assert found["corral_vm_cpu_entitled_seconds_total", busy] == 150.0
    assert found["corral_vm_cpu_wait_seconds_total", busy] == 50.0
    assert found["corral_vm_cpu_throttled_seconds_total", busy] == 1.0
    assert found["corral_vm_cpu_credit_seconds", busy] == -0.25
    assert found["corral_vm_memory_held_bytes", busy] == 100 * MIB
    assert found["corral_vm_disk_read_bytes_total", root] == 7 * MIB
    assert found["corral_vm_disk_failures_total", root] == 1
    assert found["corral_host_foreign_cores", (("host", "here"),)] == 0.75
    assert found["corral_project_cpu_limit_cores", (("project", "shop"),)] == 1.5
    assert found["corral_store_revision", ()] == 77
    kinds = {family.name: family.type for family in read_text(text)}
    assert kinds["corral_vm_cpu_seconds"] == kinds["corral_vm_disk_reads"] == "counter"
    assert kinds["corral_vm_cpu_granted_cores"] == "gauge"


def test_what_is_not_known_has_no_sample(text: str) -> None:
    found = samples(text)
    new = (("project", "shop"), ("vm", "new"))
    assert found["corral_vm_cpu_weight", new] == 100
    assert ("corral_vm_cpu_seconds_total", new) not in found
    assert ("corral_vm_memory_held_bytes", new) not in found
    counted = {dict(labels)["nic"] for name, labels in found if name == "corral_vm_nic_sent_bytes_total"}
    assert counted == {"net1"}


def test_records_are_counted_whether_they_run_or_not(text: str) -> None:
    found = samples(text)
    stopped = (("project", "shop"), ("vm", 'q"uo\\te\n'))
    assert found["corral_vm_boots_total", stopped] == 4
    assert found["corral_vm_failures", stopped] == 2
    assert found["corral_vms", (("phase", "stopped"), ("project", "shop"))] == 1
    assert found["corral_vms", (("phase", "running"), ("project", "shop"))] == 0
    assert found["corral_tasks", (("state", "failed"),)] == 0


def test_what_clients_make_up_is_no_label(text: str) -> None:
    routes = {dict(labels)["route"] for name, labels in samples(text) if name == "corral_api_requests_total"}
    assert routes == {"/v1/vms", "other"}
    assert 'method="other"' in text
    assert "BREW" not in text


def test_openmetrics_for_who_asks_for_it() -> None:
    body, media = Metrics().text(SEEN, "application/openmetrics-text;version=nonsense, text/plain;q=0.5")
    assert media.startswith("application/openmetrics-text")
    assert {"corral_vm_cpu_seconds", "corral_vm_info"} <= {family.name for family in read_openmetrics(body.decode())}


def test_every_figure_is_documented_and_nothing_else_is(text: str) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/metrics.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_]+)`", page, re.MULTILINE))
    assert documented == {name for name in names(text) if name.startswith("corral_")}


@pytest.fixture
async def app() -> Gate:
    rt = Runtime(random=SeededRandom(1))
    service = Service(Objects(MemoryStore(rt), rt), rt)
    await service.ensure_defaults()
    await service.create_image({"name": "debian", "spec": {"source": "build", "recipe": "debian"}})
    await service.create_vms({"name": "web", "spec": {"image": "debian"}})
    return build(service, FakeLive(), lambda: {"version": "1"})


@pytest.fixture
async def http(app: Gate) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def test_a_scrape_counts_the_requests_before_it(http: httpx2.AsyncClient) -> None:
    await http.get("/v1/vms/web")
    await http.get("/v1/vms/nobody")
    await http.get("/v1/vms/web")
    answer = await http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    asked = (("method", "GET"), ("route", "/v1/vms/{ref}"))
    assert found["corral_api_requests_total", (("code", "200"), *asked)] == 2
    assert found["corral_api_requests_total", (("code", "404"), *asked)] == 1
    assert found["corral_api_request_seconds_count", asked] == 3
    assert found["corral_vms", (("phase", "pending"), ("project", "default"))] == 1
    assert found["corral_tasks", (("state", "pending"),)] == 2


async def test_it_is_as_guarded_as_everything_else(app: Gate) -> None:
    transport = httpx2.ASGITransport(app, client=("127.0.0.1", 1))  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport, base_url="http://evil.example") as client:
        assert (await client.get("/metrics")).status_code == 403
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        found = samples((await client.get("/metrics")).text)
    assert found["corral_api_requests_total", (("code", "403"), ("method", "GET"), ("route", "other"))] == 1


def test_usage_without_anything_is_a_scrape_too() -> None:
    bare = msgspec.structs.replace(HOST, mode="", idle=None, foreign=None, governor=None)
    found = samples(Metrics().text(Snapshot(Usage(at=1.0, host=bare), (), (), 0))[0].decode())
    assert found["corral_governor_up", (("host", "here"),)] == 0
    assert ("corral_host_idle_cores", (("host", "here"),)) not in found
