"""HTTP in front of the service: status codes, problem bodies, ETags, streams, sockets; with a living host made of data."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from uvicorn.protocols.utils import ClientDisconnected
from websockets.asyncio.client import unix_connect
from websockets.exceptions import ConnectionClosed

from corral.api import sockets, watch
from corral.api.app import build
from corral.api.gate import Gate
from corral.api.service import Service
from corral.client import frames
from corral.client.aio import AsyncClient
from corral.errors import CODES, Refused, Unavailable
from corral.guest.protocol import Command, Ended, GuestInfo, Output
from corral.model import Vm
from corral.model.usage import HostUsage, Usage
from corral.runtime import Runtime, SeededRandom, SystemClock
from corral.store.memory import MemoryStore
from corral.store.objects import Objects

CHUNK = 256 << 10


class Program:
    """``yes``: output without end · ``count``: swallows its input and says how much · ``gone``: its guest dies."""

    def __init__(self, command: Command) -> None:
        self.name, self.given, self.made, self.closed = command.argv[0], 0, 0, False
        self.ended = asyncio.Event()
        self.slow = asyncio.Event()

    async def output(self) -> AsyncIterator[Output | Ended]:
        if self.name == "gone":
            raise Unavailable("the guest has gone", code="unresponsive")
        while self.name == "yes":
            self.made += CHUNK
            yield Output(stream=1, data=b"y" * CHUNK)
        await self.ended.wait()
        yield Output(stream=2, data=str(self.given).encode())
        yield Ended(status=0)

    async def write(self, data: bytes) -> None:
        if self.name == "deaf":
            await self.slow.wait()
        self.given += len(data)

    async def eof(self) -> None:
        self.ended.set()

    async def signal(self, number: int) -> None:
        self.ended.set()

    async def resize(self, rows: int, columns: int) -> None: ...

    async def close(self) -> None:
        self.closed = True


class FakeLive:
    """A host of which the tests know everything."""

    def __init__(self) -> None:
        self.programs: list[Program] = []
        self.uploaded = 0

    async def run(self, vm_id: str, command: Command) -> Program:
        if command.argv == ("refused",):
            raise Refused("nobody answers in it", code="wrong-phase")
        self.programs.append(Program(command))
        return self.programs[-1]

    async def guest_info(self, vm_id: str) -> GuestInfo:
        raise ZeroDivisionError("a mistake of ours")

    async def resize_console(self, vm_id: str, rows: int, columns: int) -> None: ...

    @asynccontextmanager
    async def console(self, vm_id: str) -> AsyncIterator[Any]:
        raise Refused("the VM has no open serial line", code="wrong-phase")
        yield

    async def serial_log(self, vm_id: str, tail: int) -> bytes:
        return b"<script>\xff"[-tail:]

    async def follow_log(self, vm_id: str) -> AsyncIterator[bytes]:
        yield b"one"
        raise Unavailable("the line broke")

    async def receive(self, image_id: str, chunks: AsyncIterator[bytes], length: int | None) -> None:
        async for chunk in chunks:
            self.uploaded += len(chunk)

    async def probe(self) -> None: ...

    async def usage(self, *, lately: bool = False) -> Usage:
        return Usage(at=1.0, host=HostUsage(name="here", cores=2, memory=1 << 30, memory_available=1 << 29))

    async def doctor(self) -> list[dict[str, Any]]:
        return [{"name": "qemu", "ok": "warn", "message": "", "hint": ""}]


@pytest.fixture
def live() -> FakeLive:
    return FakeLive()


@pytest.fixture
async def service() -> Service:
    rt = Runtime(random=SeededRandom(1))
    service = Service(Objects(MemoryStore(rt), rt), rt)
    await service.ensure_defaults()
    await service.create_image({"name": "debian", "spec": {"source": "build", "recipe": "debian"}})
    await service.create_vms({"name": "web", "spec": {"image": "debian"}})
    return service


@pytest.fixture
def app(service: Service, live: FakeLive) -> Gate:
    return build(service, live, lambda: {"version": "1"})


@pytest.fixture
async def http(app: Gate) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
async def served(app: Gate, tmp_path: Path) -> AsyncIterator[Path]:
    """The application behind a real server, on a unix socket."""
    path = tmp_path / "api.sock"
    config = uvicorn.Config(
        app, uds=str(path), log_config=None, ws="websockets-sansio", ws_max_size=1 << 20, lifespan="on",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield path
    server.should_exit = True
    await serving


def body(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    read = answer.json()
    assert {"type", "title", "status", "detail", "code"} <= set(read)
    assert read["status"] == answer.status_code
    assert read["code"] in CODES
    return dict(read)


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/v1/nothing", b"", 404, "not-found"), ("GET", "/v1/vms/nix", b"", 404, "not-found"),
        ("PUT", "/v1/vms", b"", 405, "usage"),
        ("POST", "/v1/hosts", b"{}", 405, "usage"), ("DELETE", "/v1/tasks/x", b"", 405, "usage"),
        ("POST", "/v1/vms", b"", 400, "malformed"), ("POST", "/v1/vms", b"{", 400, "malformed"),
        ("POST", "/v1/vms", b'{"spec":{},"spec":{}}', 400, "malformed"), ("POST", "/v1/vms", b"[" * 9999, 400, "malformed"),
        ("POST", "/v1/vms", b'"\xff"', 400, "malformed"), ("POST", "/v1/vms", b"null", 422, "invalid"),
        ("POST", "/v1/vms", b"[]", 422, "invalid"), ("POST", "/v1/vms", b"{}", 422, "invalid"),
        ("POST", "/v1/vms", b" " * (1 << 20) + b"{}", 413, "too-large"),
        ("POST", "/v1/vms", b'{"name":"web","spec":{"image":"debian"}}', 409, "exists"),
        ("GET", "/v1/vms?limit=0", b"", 422, "invalid"), ("GET", "/v1/vms?limit=x", b"", 400, "malformed"),
        ("GET", "/v1/vms?cursor=zzz", b"", 422, "invalid"), ("GET", "/v1/watch?kinds=vm,nix", b"", 422, "invalid"),
        ("GET", "/v1/vms?" + "&".join(f"label=a{n}" for n in range(99)), b"", 422, "invalid"),
        ("POST", "/v1/vms/web/explode", b"", 404, "not-found"), ("POST", "/v1/vms/web/stop", b'{"force":1}', 422, "invalid"),
        ("PATCH", "/v1/vms/web", b'{"status":{"host":"x"}}', 422, "invalid"), ("DELETE", "/v1/images/debian", b"", 409, "in-use"),
        ("PUT", "/v1/images/debian/content", b"x", 409, "wrong-phase"), ("GET", "/v1/vms/web/guest", b"", 500, "bug"),
    ],
)  # fmt: skip
async def test_every_error_is_a_problem_body(
    http: httpx2.AsyncClient, method: str, path: str, content: bytes, status: int, code: str
) -> None:
    answer = await http.request(method, path, content=content)
    read = body(answer)
    assert (answer.status_code, read["code"]) == (status, code), read
    assert "Traceback" not in answer.text
    assert "ZeroDivisionError" not in answer.text or status == 500
    if status == 405:
        assert answer.headers["allow"]


async def test_every_answer_has_the_headers_that_keep_browsers_honest(http: httpx2.AsyncClient) -> None:
    for path in ("/v1/vms", "/v1/nothing", "/openapi.json", "/v1/vms/web/log"):
        headers = (await http.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
    log = await http.get("/v1/vms/web/log")
    assert log.headers["content-type"].startswith("text/plain")
    assert log.content == b"<script>\xff"


async def test_etags(http: httpx2.AsyncClient) -> None:
    first = await http.get("/v1/vms/web")
    tag = first.headers["etag"]
    assert tag == f'"{first.json()["meta"]["revision"]}"'
    same = await http.get("/v1/vms/web", headers={"If-None-Match": tag})
    assert (same.status_code, same.content) == (304, b"")
    changed = await http.patch("/v1/vms/web", json={"labels": {"a": "b"}}, headers={"If-Match": tag})
    assert (changed.status_code, changed.json()["kind"]) == (200, "vm")
    stale = await http.patch("/v1/vms/web", json={"labels": {"a": "c"}}, headers={"If-Match": tag})
    assert body(stale)["code"] == "stale"
    assert stale.status_code == 412
    assert body(await http.patch("/v1/vms/web", json={}, headers={"If-Match": "nonsense"}))["code"] == "malformed"
    assert (await http.get("/v1/vms/web", headers={"If-None-Match": tag})).status_code == 200


async def test_keys_over_http(http: httpx2.AsyncClient) -> None:
    new = {"spec": {"image": "debian"}}
    one = await http.post("/v1/vms", json=new, headers={"Idempotency-Key": "k"})
    two = await http.post("/v1/vms", json=new, headers={"Idempotency-Key": "k"})
    assert one.status_code == two.status_code == 202
    assert one.json() == two.json()
    other = await http.post("/v1/vms", json={"count": 2, **new}, headers={"Idempotency-Key": "k"})
    assert body(other)["code"] == "idempotency"


async def test_who_asks_by_another_name_over_tcp_is_turned_away(http: httpx2.AsyncClient) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        answer = await http.get("/v1/version", headers=headers)
        assert body(answer)["code"] == "denied"
        assert answer.status_code == 403
    fine = await http.get("/v1/version", headers={"Host": "127.0.0.1:8470", "Origin": "http://127.0.0.1:8470"})
    assert fine.status_code == 200


async def test_too_many_requests_are_told_so_at_once() -> None:
    release = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    gate = Gate(slow, SystemClock(), lambda *_: None)
    transport = httpx2.ASGITransport(gate)  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        waiting = [asyncio.create_task(client.get("/")) for _ in range(1000)]
        await asyncio.sleep(0.5)
        refused = await client.get("/")
        assert body(refused)["code"] == "unavailable"
        assert refused.headers["retry-after"] == "1"
        release.set()
        assert {(await one).status_code for one in waiting} == {204}
        assert (await client.get("/")).status_code == 204


@pytest.mark.parametrize("gone_at", ["accept", "send_bytes", "close"])
async def test_a_client_of_a_socket_that_goes_away_at_any_moment_is_no_error(gone_at: str) -> None:
    done = []

    class Client:
        async def accept(self) -> None:
            self._reach("accept")

        async def send_bytes(self, data: bytes) -> None:
            self._reach("send_bytes")

        async def close(self, code: int) -> None:
            self._reach("close")

        def _reach(self, step: str) -> None:
            done.append(step)
            if step == gone_at:
                raise ClientDisconnected

    async def serve() -> None:
        raise Refused("nobody answers in it", code="wrong-phase")

    sessions, client = sockets._Sessions(), Client()
    await sessions.hold(client, serve, binary=True)  # type: ignore[arg-type]
    assert done[-1] == gone_at
    assert sessions._open == 0


async def test_a_thousand_holds_refuse_further_ones_and_nothing_else() -> None:
    release = asyncio.Event()

    async def long(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"].endswith(("/hold", "/watch")):
            await release.wait()
        await send({"type": "http.response.body"})

    gate = Gate(long, SystemClock(), lambda *_: None)
    transport = httpx2.ASGITransport(gate)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        holds = [asyncio.create_task(client.get(f"/v1/vms/{number}/hold")) for number in range(1000)]
        await asyncio.sleep(0.5)
        refused = await client.get("/v1/vms/one-more/hold")
        assert (refused.status_code, "ephemeral VMs are held" in body(refused)["detail"]) == (503, True)
        assert (await client.get("/v1/vms")).status_code == 200
        watches = [asyncio.create_task(client.get("/v1/watch")) for number in range(1000)]
        await asyncio.sleep(0.5)
        assert "watches" in body(await client.get("/v1/watch"))["detail"]
        assert (await client.get("/v1/vms")).status_code == 200
        release.set()
        assert {(await one).status_code for one in (*holds, *watches)} == {200}
        assert (await client.get("/v1/vms/one-more/hold")).status_code == 200


async def test_a_watch_shows_changes_and_beats(served: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HEARTBEAT_S", 0.05)
    async with AsyncClient(f"unix:{served}") as client:
        stream = client.watch("vm", "task")
        first = await anext(stream)
        assert first.changes == []
        assert (await anext(stream)).changes == []  # a heartbeat
        await service.patch("vm", "web", {"labels": {"a": "b"}})
        await service.power("stop", "web")
        seen: list[Any] = []
        while len(seen) < 3:
            batch = await anext(stream)
            assert batch.revision >= first.revision
            seen += [(change["kind"], change["object"]["kind"]) for change in batch.changes]
        assert seen == [("vm", "vm"), ("vm", "vm"), ("task", "task")]
        await stream.aclose()  # type: ignore[attr-defined]
        again = client.watch("vm", from_revision=first.revision + 1)
        await anext(again)
        assert (await anext(again)).changes[0]["object"]["meta"]["labels"] == {"a": "b"}
        await again.aclose()  # type: ignore[attr-defined]


async def test_a_watch_of_one_object_shows_only_that(served: Path, service: Service) -> None:
    await service.create_vms({"name": "two", "spec": {"image": "debian"}})
    two = await service.objects.find(Vm, "two")
    async with AsyncClient(f"unix:{served}") as client:
        stream = client.watch("vm", id=two.meta.id)
        await anext(stream)
        await service.patch("vm", "web", {"labels": {"a": "b"}})
        await service.patch("vm", "two", {"labels": {"a": "b"}})
        assert [change["id"] for change in (await anext(stream)).changes] == [two.meta.id]
        await stream.aclose()  # type: ignore[attr-defined]


async def test_a_log_stream_that_breaks_simply_ends(served: Path) -> None:
    async with AsyncClient(f"unix:{served}") as client:
        assert [piece async for piece in client.vms.follow_log("web")] == [b"one"]


async def test_output_waits_for_a_slow_reader(served: Path, live: FakeLive) -> None:
    async with AsyncClient(f"unix:{served}") as client, client.vms.exec("web", ("yes",)) as program:
        assert await program.read() is not None
        await asyncio.sleep(0.5)
        stopped_at = live.programs[0].made
        assert stopped_at < 32 << 20
        await asyncio.sleep(0.3)
        assert live.programs[0].made == stopped_at
    for _ in range(200):
        if live.programs[0].closed:
            break
        await asyncio.sleep(0.01)
    assert live.programs[0].closed


async def test_much_output_passes_in_little_memory(served: Path, live: FakeLive) -> None:
    before, taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    async with AsyncClient(f"unix:{served}") as client, client.vms.exec("web", ("yes",)) as program:
        while taken < 256 << 20:
            item = await program.read()
            assert item is not None
            taken += len(item.data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


async def test_input_waits_for_a_slow_guest(served: Path, live: FakeLive) -> None:
    async with AsyncClient(f"unix:{served}") as client, client.vms.exec("web", ("deaf",)) as program:
        sent, stuck = 0, False
        while not stuck and sent < 64 << 20:
            try:
                await asyncio.wait_for(program.write(b"x" * 65536), 1)
                sent += 65536
            except TimeoutError:
                stuck = True
        assert sent < 32 << 20
        live.programs[0].slow.set()
        await program.eof()
        said = await program.read()
        assert said is not None
        assert int(said.data) == live.programs[0].given >= sent


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ('{"argv":["refused"]}', "wrong-phase"), ('{"argv":["gone"]}', "unresponsive"), ('{"argv":[]}', "invalid"),
        ("nonsense", "malformed"), ('{"argv":["a"],"argv":["b"]}', "malformed"), ('{"argv":["a\\u0000b"]}', "invalid"),
        ('{"argv":["a"],"rows":0}', "invalid"), ('{"argv":["a"],"env":{"A=B":""}}', "invalid"), ('{"argv":"a"}', "invalid"),
        (json.dumps({"argv": ["x" * 300_000]}), "invalid"),
    ],
)  # fmt: skip
async def test_what_goes_wrong_in_a_socket_is_its_last_message(served: Path, first: str, code: str) -> None:
    async with unix_connect(str(served), "ws://localhost/v1/vms/web/exec") as line:
        await line.send(first)
        answer = await line.recv()
        assert isinstance(answer, bytes)
        assert answer[0] == frames.ERROR
        assert json.loads(answer[1:])["code"] == code
        await line.wait_closed()
        assert line.close_code == 1011


@pytest.mark.parametrize("frame", [b"", b"\x09", b"\x02", b"\x02\xff", b"\x03\x00", "text"])
async def test_frames_that_mean_nothing_end_the_program(served: Path, live: FakeLive, frame: bytes | str) -> None:
    async with unix_connect(str(served), "ws://localhost/v1/vms/web/exec") as line:
        await line.send('{"argv":["count"]}')
        await line.send(frame)
        answer = await line.recv()
        assert isinstance(answer, bytes)
        assert json.loads(answer[1:])["code"] == "malformed"
    assert live.programs[0].closed


async def test_a_huge_frame_closes_the_socket(served: Path, live: FakeLive) -> None:
    async with unix_connect(str(served), "ws://localhost/v1/vms/web/exec", compression=None) as line:
        await line.send('{"argv":["count"]}')
        with suppress(ConnectionClosed):
            await line.send(b"\0" * (16 << 20))
        await line.wait_closed()
        assert line.close_code == 1009


async def test_console_errors_are_text(served: Path) -> None:
    async with unix_connect(str(served), "ws://localhost/v1/vms/web/console") as line:
        answer = await line.recv()
        assert isinstance(answer, str)
        assert json.loads(answer)["code"] == "wrong-phase"


async def test_uploads_stream_past_the_limit_of_bodies(served: Path, service: Service, live: FakeLive) -> None:
    await service.create_image({"name": "up", "spec": {"source": "upload", "format": "raw"}})

    async def zeroes() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 20)

    async with AsyncClient(f"unix:{served}") as client:
        answer = await client.images.upload("up", zeroes())
    assert live.uploaded == 64 << 20
    assert answer.items[0].name == "up"


async def test_openapi_shows_every_route_and_its_errors(http: httpx2.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    paths = document["paths"]
    assert {"/v1/vms", "/v1/vms/{ref}", "/v1/vms/{ref}/start", "/v1/images/{ref}/content", "/v1/watch"} <= set(paths)
    create = paths["/v1/vms"]["post"]
    assert create["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("CreateVms")
    assert {"200", "202", "400", "409", "412", "413", "422", "503"} <= set(create["responses"])
    assert list(create["responses"]["422"]["content"]) == ["application/problem+json"]
    vm = document["components"]["schemas"]["Vm"]
    assert vm["properties"]["kind"]["const"] == "vm"
    assert vm["additionalProperties"] is False


async def test_usage_is_what_the_host_says(http: httpx2.AsyncClient) -> None:
    answer = await http.get("/v1/usage")
    assert answer.status_code == 200
    assert answer.json()["host"]["cores"] == 2
