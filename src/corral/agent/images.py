"""Images on their way in: built, fetched or uploaded, checked, ready; and out again.

One job an image, few at a time. A job is nothing durable: it is started again when the record says that the image is
not ready yet, and what it does (a download, a build) resumes by itself. Progress is told once a second, not per block.

A build whose recipe has changed since, or whose corral-guest, is built again and exchanged when no VM has it under its
disk; until then that is said.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import structlog

from corral.agent.events import EventLog
from corral.agent.host import Registration
from corral.agent.picture import Picture
from corral.agent.ports import BootFiles, Images
from corral.agent.progress import TaskBook
from corral.agent.settings import Settings
from corral.agent.verdict import Verdict
from corral.errors import CorralError, NotFound, Refused
from corral.model import Image, ImagePhase, ImageStatus, TaskState, TemplatePhase
from corral.runtime import KeyedQueue, Runtime
from corral.store.objects import Objects

log = structlog.get_logger("images")

REPORT_S = 1.0
USERS_S = 60.0
"""Between two looks at whether an outdated image is still used."""
OUTDATED = "its recipe, or the corral-guest in it, has changed since it was built"


class Meter:
    """What a job says of its progress; read once a second."""

    def __init__(self) -> None:
        self.step, self.done, self.total = "", 0, 0

    def __call__(self, step: str, done: int, total: int) -> None:
        self.step, self.done, self.total = step, done, total

    @property
    def share(self) -> float | None:
        return min(1.0, self.done / self.total) if self.total else None


class ImageJobs:
    """The images of one host, whose name is written into them."""

    def __init__(
        self, objects: Objects, images: Images, rt: Runtime, settings: Settings,
        *, book: TaskBook, events: EventLog, picture: Picture, registration: Registration,
    ) -> None:  # fmt: skip
        self._objects, self._images, self._rt, self._settings = objects, images, rt, settings
        self._book, self._events, self._picture = book, events, picture
        self._registration = registration
        self._queue = KeyedQueue(rt.clock, self._handle, workers=4, on_error=self._failed)
        self._places = asyncio.Semaphore(settings.image_jobs)
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._uploads: dict[str, Path | None] = {}  # received and not yet accepted; None: being received
        self._digests: dict[str, str] = {}  # of images seen ready, to clean up after a deleted record
        self._tried: dict[str, str] = {}  # recipes that an image could not be built by again: once is enough

    def poke(self, id: str) -> None:
        """Something about this image may have changed."""
        self._queue.add(id)

    def busy(self, id: str) -> bool:
        return id in self._jobs or id in self._digests

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._queue.run()

    async def close(self) -> None:
        """Stop all jobs; they resume with the next start."""
        for job in self._jobs.values():
            job.cancel()
        await asyncio.gather(*self._jobs.values(), return_exceptions=True)

    def _failed(self, id: str, error: Exception) -> None:
        log.error("an image could not be handled", image=id, exc_info=error)

    async def _handle(self, id: str) -> float | None:
        image = self._picture.images.get(id)
        if image is None:
            return await self._gone(id)
        if image.status.host not in ("", self._registration.name):
            return None
        if image.meta.deleted is not None:
            return await self._delete(image)
        phase = image.status.phase
        if phase is ImagePhase.READY:
            return await self._ready(image)
        if phase is ImagePhase.ERROR:
            await self._end(id, Verdict(TaskState.FAILED, _problem(image)))
            return None
        left = await self._limit(image)
        if left is None:
            return None
        if id not in self._jobs and (image.spec.source != "upload" or self._uploads.get(id)):
            self._start(image, self._job(image))
        elif phase is ImagePhase.CHECKING and id not in self._jobs and id not in self._uploads:
            await self._set(id, phase=ImagePhase.ERROR, reason="its upload was interrupted; send it again")
        return left

    async def _ready(self, image: Image) -> float | None:
        id, digest = image.meta.id, image.status.digest
        if id not in self._digests:
            try:
                self._images.files(digest)
            except NotFound:
                await self._set(id, phase=ImagePhase.ERROR, reason="its files are missing on this host")
                return None
            self._digests[id] = digest
        await self._end(id, Verdict(TaskState.DONE))
        return await self._renew(image)

    async def _renew(self, image: Image) -> float | None:
        """See whether it is what a build of today would be made of; seconds until the next look."""
        id, status, recipe = image.meta.id, image.status, self._recipe(image)
        if recipe in ("", status.recipe, self._tried.get(id)):
            return None
        if id in self._jobs:
            return REPORT_S
        if users := self._users(image):
            names = ", ".join(users[:3]) + (" …" if users[3:] else "")
            text = f"{OUTDATED}; it is built again when {names} no longer need it"
            if not status.reason:
                self._events.emit(image, "Outdated", f"image {image.meta.name}: {text}", "warning")
            if status.reason != text:
                await self._set(id, reason=text)
            return USERS_S
        self._start(image, self._rebuild(image, recipe))
        return None

    def _recipe(self, image: Image) -> str:
        """What a build of today would be made of; empty: it is no build, or cannot be built here."""
        spec = image.spec
        return self._images.recipe(spec.recipe, spec.arch) if spec.source == "build" else ""

    def _users(self, image: Image) -> list[str]:
        """Names of those that need the image's present files: VMs with a disk over them or a process, and templates."""
        picture, id = self._picture, image.meta.id
        vms = [vm for vm in picture.vms.values() if vm.spec.image_id == id]
        making = [one for one in picture.templates.values() if one.spec.image_id == id]
        bound = bool(image.status.virtual_size)
        return [
            *(vm.meta.name for vm in vms if vm.meta.id in picture.alive or (bound and vm.status.boots)),
            *(one.meta.name for one in making if one.status.phase is TemplatePhase.BUILDING),
        ]

    async def _rebuild(self, image: Image, recipe: str) -> None:
        """Build it again, and exchange it in a moment when nobody needs what there is. It stays ready meanwhile."""
        id, name, old = image.meta.id, image.meta.name, image.status.digest
        async with self._places:
            try:
                files = await self._images.build(image.spec.recipe, image.spec.arch, Meter())
            except CorralError as error:
                self._tried[id] = recipe
                reason = f"{OUTDATED}, and it could not be built again: {error.message}"
                await self._set(id, reason=reason)
                self._events.emit(image, "Outdated", f"image {name}: {reason}", "warning")
                return
            if files.digest != old:
                # From now on no VM starts with it, so that none is between its start and its record.
                await self._set(id, phase=ImagePhase.BUILDING, reason="it is being exchanged")
                if self._users(image):
                    await self._set(id, phase=ImagePhase.READY, reason="")
                    await self._discard(files.digest)
                    self.poke(id)
                    return
            await self._made(image, files, recipe)
            if files.digest != old:
                await self._discard(old)
                self._events.emit(image, "Rebuilt", f"image {name} is built anew: {OUTDATED}")
        self.poke(id)

    async def _limit(self, image: Image) -> float | None:
        """Seconds until the next deadline; None when the image was cancelled or is too late."""
        left, verdict = self._book.due(image.meta.id)
        if verdict is None:
            return left
        assert verdict.error is not None
        await self._give_up(image, verdict.error, verdict.state)
        return None

    async def _give_up(self, image: Image, error: CorralError, state: TaskState) -> None:
        await self._cancel(image.meta.id)
        await self._set(image.meta.id, phase=ImagePhase.ERROR, reason=error.message)
        await self._end(image.meta.id, Verdict(state, error))

    async def _end(self, id: str, verdict: Verdict) -> None:
        image = self._picture.images.get(id)
        result = {"image": image.meta.name, "digest": image.status.digest} if image is not None else {}
        for task in self._book.of(id):
            await self._book.finish(task, verdict, result if verdict.state is TaskState.DONE else {})

    async def _cancel(self, id: str) -> None:
        job = self._jobs.pop(id, None)
        if job is not None:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)

    # One job

    def _start(self, image: Image, work: Coroutine[Any, Any, None]) -> None:
        id = image.meta.id
        job = asyncio.get_running_loop().create_task(work, name=f"image-{image.meta.name}")
        self._jobs[id] = job
        job.add_done_callback(lambda done: self._jobs.pop(id, None) if self._jobs.get(id) is done else None)

    async def _job(self, image: Image) -> None:
        id, meter = image.meta.id, Meter()
        self._book.step(id, "turn", "waits for other images")
        async with self._places:
            reporter = asyncio.get_running_loop().create_task(self._report(id, meter))
            try:
                files = await self._work(image, meter)
                recipe = self._recipe(image)
                if image.status.digest and self._users(image):  # killed in the middle of being exchanged
                    files, recipe = self._images.files(image.status.digest), image.status.recipe
                await self._made(image, files, recipe)
                self._events.emit(image, "Ready", f"image {image.meta.name} is ready")
            except CorralError as error:
                reason = error.message + (f" ({error.hint})" if error.hint else "")
                await self._set(id, phase=ImagePhase.ERROR, reason=reason)
                await self._end(id, Verdict(TaskState.FAILED, error))
                self._events.emit(image, "Failed", reason, "error")
            finally:
                reporter.cancel()
                self._uploads.pop(id, None)
        self.poke(id)

    async def _made(self, image: Image, files: BootFiles, recipe: str) -> None:
        """It is ready, with these files."""
        id = image.meta.id
        self._digests.pop(id, None)
        await self._set(
            id, phase=ImagePhase.READY, reason="", digest=files.digest, size=files.size, recipe=recipe,
            virtual_size=files.virtual_size, boot=files.boot, min_memory=files.min_memory,
            agent=files.agent, default_user=files.default_user, host=self._registration.name,
        )  # fmt: skip

    async def _work(self, image: Image, meter: Meter) -> BootFiles:
        id, spec = image.meta.id, image.spec
        files: BootFiles
        if spec.source == "build":
            await self._set(id, phase=ImagePhase.BUILDING, reason="", host=self._registration.name)
            files = await self._images.build(spec.recipe, spec.arch, meter)
        elif spec.source == "upload":
            path = self._uploads.get(id)
            assert path is not None, "a job for an upload that was not received"
            await self._set(id, phase=ImagePhase.CHECKING, reason="", host=self._registration.name)
            files = await self._images.accept(path, spec, meter)
        else:
            await self._set(id, phase=ImagePhase.FETCHING, reason="", host=self._registration.name)
            files = await self._images.fetch(spec, meter)
        return files

    async def _report(self, id: str, meter: Meter) -> None:
        """Tell tasks and record how far a job is, where that changed."""
        told: tuple[str, int, int] | None = None
        while True:
            await self._rt.clock.sleep(REPORT_S if told else 0.05)
            now = (meter.step, meter.done, meter.total)
            if now == told or not meter.step:
                told = told or ("", 0, 0)
                continue
            told = now
            self._book.step(id, meter.step, progress=meter.share)
            try:
                await self._set(id, received=meter.done, total=meter.total)
            except CorralError as error:
                log.warning("progress not written", image=id, error=error.message)

    async def _set(self, id: str, **status: Any) -> None:
        """Change the image's status; what is gone stays gone."""

        def mutate(current: Image) -> Image:
            changed: ImageStatus = msgspec.structs.replace(current.status, **status)
            return msgspec.structs.replace(current, status=changed)

        try:
            written = await self._objects.change(Image, id, mutate)
            self._picture.put(written)
        except NotFound:
            self._picture.bury(id)

    # Uploads

    async def receive(self, id: str, chunks: AsyncIterator[bytes], length: int | None) -> None:
        """Take an upload; returns when its bytes are durable and its check has begun.

        Raises Refused ``wrong-phase`` when the image takes no content, ``too-large``, and what the image store raises.
        """
        image = await self._objects.get(Image, id)
        if image.spec.source != "upload":
            raise Refused(f"image {image.meta.name} is not an upload", code="wrong-phase")
        if image.status.phase not in (ImagePhase.PENDING, ImagePhase.ERROR) or id in self._uploads:
            raise Refused(
                f"image {image.meta.name} has its content, or is getting it", code="wrong-phase",
                hint="make another image for other content",
            )  # fmt: skip
        if length is not None and length > self._settings.image_limit:
            raise Refused(f"{length} bytes are more than an image may have", code="too-large")
        self._uploads[id] = None
        self._book.step(id, "receive")
        try:
            path = await self._images.receive(id, chunks, limit=self._settings.image_limit)
        except BaseException:
            del self._uploads[id]
            raise
        self._uploads[id] = path
        await self._set(id, phase=ImagePhase.CHECKING, reason="", host=self._registration.name)
        self.poke(id)

    # The way out

    async def _delete(self, image: Image) -> float | None:
        """Asked to go: its files first, its record last."""
        id = image.meta.id
        await self._cancel(id)
        await self._remove_files(id, image.status.digest)
        if not await self._book.remove(Image, id):
            return 0.1
        self._picture.bury(id)
        return None

    async def _gone(self, id: str) -> float | None:
        """The record was removed: what it was for goes too."""
        await self._cancel(id)
        await self._remove_files(id, self._digests.get(id, ""))
        await self._end(id, Verdict(TaskState.CANCELLED, Refused("the image was deleted", code="cancelled")))
        return None

    async def _remove_files(self, id: str, digest: str) -> None:
        await self._discard(digest, but=id)
        self._digests.pop(id, None)

    async def _discard(self, digest: str, but: str = "") -> None:
        """Have files gone that no record names, except perhaps one: records may share content."""
        others = {i.status.digest for i in self._picture.images.values() if i.meta.id != but}
        if digest and digest not in others:
            await self._images.remove(digest)


def _problem(image: Image) -> CorralError:
    code = "cancelled" if image.status.reason == "cancelled" else "bad-image"
    return CorralError(image.status.reason or "it failed", code=code)
