"""Holding an ephemeral VM, for synchronous callers: a thread reads the stream, everybody else waits for what it saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from corral.client import calls
from corral.client.held import CUT_S, LAST_WORDS_S, RECONNECT_S, Held
from corral.client.record import SILENCE_S, Batch, Record, read_batch
from corral.errors import CorralError, NotFound, TimedOut, Unavailable

if TYPE_CHECKING:
    from corral.client.sync import Client
    from corral.client.sync.http import Stream


class Hold:
    """Keeps a VM alive until it is closed. ``held`` is how the VM was last seen; ``told`` hears of each change of it.

    A daemon that goes away is looked for, so that a sandbox outlives its restart.
    """

    def __init__(
        self, client: Client, vm: Record, launch: Record, *, told: Callable[[Held], None] | None = None
    ) -> None:
        self.held = Held(vm, launch)
        self._client, self._told = client, told
        self._turn = threading.Condition()
        self._lost: CorralError | None = None
        self._give_up_at: float | None = None
        """When to give up looking for a daemon that went away; none while it is there."""
        self._closed = False
        self._watchers: list[Callable[[], object]] = []
        self._stream: Stream | None = None
        self._thread = threading.Thread(target=self._serve, name=f"hold-{vm.id}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hold no longer: what is still there is then deleted by the daemon."""
        with self._turn:
            self._closed = True
            if self._stream is not None:
                self._stream.abort()
        self._thread.join()

    def wait_answer(self, timeout: float) -> Record:
        """The VM when its guest answers. Raises what went wrong instead; TimedOut naming what it waited for."""
        with self._turn:
            self._turn.wait_for(lambda: self.held.answers or self._failure() is not None, timeout)
            failure = self._failure()
            if failure is not None:
                raise failure
            if not self.held.answers:
                raise self.held.late(timeout)
            return self.held.vm

    def wait_end(self, timeout: float) -> CorralError | None:
        """Why the VM is over, if that is heard of within ``timeout`` seconds."""
        with self._turn:
            self._turn.wait_for(lambda: self._failure() is not None, timeout)
            return self._failure()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Where the guest does not answer any more because its VM is over, the block's error becomes that, and why."""
        try:
            yield
        except CorralError as error:
            if error.exit_status != 5 or isinstance(error, TimedOut):
                raise  # not a silence, or one that the caller's own limit ended
            raise self.wait_end(LAST_WORDS_S) or self.held.silence() or error from error

    @contextmanager
    def cutting(self, cut: Callable[[], object]) -> Iterator[None]:
        """For the length of the block: ``cut()`` is called (in another thread) when the VM is over."""
        with self._turn:
            self._watchers.append(cut)
            over = self._failure() is not None
        if over:
            self._cut()
        try:
            yield
        finally:
            with self._turn:
                self._watchers.remove(cut)

    def _cut(self) -> None:
        """Programs that still seem to run are cut off, but not at once: their last output may be on its way."""

        def work() -> None:
            with self._turn:
                watchers = list(self._watchers)
            for cut in watchers:
                cut()

        timer = threading.Timer(CUT_S, work)
        timer.daemon = True
        timer.start()

    def _failure(self) -> CorralError | None:
        return self.held.failure() or self._lost

    def _serve(self) -> None:
        while not self._closed and not self.held.deleted:
            try:
                self._read()
            except NotFound:
                self._learn(deleted=True)
            except CorralError as error:
                self._give_up_at = self._give_up_at or time.monotonic() + RECONNECT_S
                if not isinstance(error, Unavailable) or time.monotonic() > self._give_up_at:
                    self._learn(lost=error)
                    return
            if not self._closed:
                time.sleep(0.1)

    def _read(self) -> None:
        """One connection, to its end."""
        call = calls.of_vm("hold", self.held.vm.id, self.held.vm.project)
        with self._client.http.stream(call, timeout=SILENCE_S) as stream:
            with self._turn:
                self._stream = stream
                if self._closed:
                    return
            for line in stream.lines():
                self._give_up_at = None
                self._learn(read_batch(line))
                if self.held.deleted:
                    return

    def _learn(self, batch: Batch | None = None, *, deleted: bool = False, lost: CorralError | None = None) -> None:
        with self._turn:
            if batch is not None:
                self.held.take(batch)
            self.held.deleted = self.held.deleted or deleted
            self._lost = self._lost or lost
            over = bool(self._watchers) and self._failure() is not None
            self._turn.notify_all()
        if over:
            self._cut()
        if self._told is not None:
            self._told(self.held)
