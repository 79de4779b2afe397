"""Waiting for tasks: what is shown, what a lost connection, a failure, patience and Ctrl-C mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from corral.cli import wait as waiting_module
from corral.cli.session import Session
from corral.cli.wait import Waiting
from corral.client.record import Batch, Record
from corral.errors import TimedOut, Unavailable, WatchLost


def task(number: str, state: str, step: str = "", **status: Any) -> Record:
    steps = [{"name": step, "state": "running", "message": ""}] if step else []
    return Record(
        kind="task", meta={"id": number, "name": number, "revision": 1},
        spec={"verb": "launch", "target_kind": "vm", "target_id": "v", "target_name": "web"},
        status={"state": state, "steps": steps, **status},
    )  # fmt: skip


class FakeClient:
    """Its watches play what they are given: batches of tasks, or errors; ``now`` is what reading finds."""

    def __init__(self, *watches: list[Any]) -> None:
        self.watches = list(watches)
        self.now: dict[str, Record] = {}

    def watch(self, kind: str, *, until: float | None = None) -> Iterator[Batch]:
        assert kind == "task"
        yield Batch(1, [])
        for item in self.watches.pop(0) if self.watches else iter(lambda: None, 0):
            if item is None:
                yield Batch(3, [])  # heartbeats, for ever
                continue
            if isinstance(item, BaseException):
                raise item
            self.now[item.id] = item
            yield Batch(2, [{"kind": "task", "id": item.id, "object": item}])


class FakeSession(Session):
    def __init__(self, client: FakeClient) -> None:
        self.fake = client

    @property
    def client(self) -> Any:
        return self.fake

    def get(self, kind: str, ref: str) -> Record:
        return self.fake.now[ref]


@pytest.fixture
def wait_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Waiting, Callable[..., Any]]]:
    monkeypatch.setattr(waiting_module.time, "sleep", lambda _: None)

    def make(*watches: list[Any], tasks: tuple[Record, ...] = ()) -> Any:
        client = FakeClient(*watches)
        begun = tasks or (task("t1", "pending"),)
        client.now = {t.id: t for t in begun}
        return Waiting(FakeSession(client), begun)

    return make


def test_each_step_is_one_line_without_a_terminal(wait_for: Any, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = wait_for(
        [
            task("t1", "running", "disk"),
            task("t1", "running", "disk"),
            task("t1", "running", "boot"),
            task("t1", "done"),
        ]
    )
    assert waiting.run() == []
    assert capsys.readouterr().err == "web: disk\nweb: booting\n"


def test_a_task_that_ended_before_the_watch_began_is_read(wait_for: Any) -> None:
    waiting = wait_for([])
    waiting.session.fake.now["t1"] = task("t1", "done")
    assert waiting.run() == []


def test_a_lost_connection_is_made_again(wait_for: Any) -> None:
    waiting = wait_for([Unavailable("gone")], [WatchLost("compacted")], [task("t1", "done")])
    assert waiting.run() == []


def test_a_failed_task_gives_its_own_error_with_the_serial_log(wait_for: Any) -> None:
    problem = {"code": "timed-out", "detail": "waited for the guest", "details": {"serial": "panic"}}
    waiting = wait_for([task("t1", "failed", error=problem)])
    (error,) = waiting.run()
    assert isinstance(error, TimedOut)
    assert (error.exit_status, error.details["serial"]) == (5, "panic")


def test_patience_ends_and_names_the_step(wait_for: Any) -> None:
    waiting = wait_for([task("t1", "running", "guest answers"), TimedOut("silence")])
    (error,) = waiting.run(timeout_s=0.05)
    assert error.exit_status == 5
    assert "launch web has not ended yet: guest answers" in error.message


def test_ctrl_c_says_what_goes_on_and_how_to_cancel_it(wait_for: Any, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = wait_for([task("t1", "running", "disk"), KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        waiting.run()
    said = capsys.readouterr().err
    assert "launch web" in said
    assert "corral task cancel t1" in said


def test_several_tasks_are_waited_for_together(wait_for: Any) -> None:
    two = (task("t1", "pending"), task("t2", "pending"))
    waiting = wait_for([task("t2", "done"), task("t1", "cancelled")], tasks=two)
    (error,) = waiting.run()
    assert error.code == "cancelled"
