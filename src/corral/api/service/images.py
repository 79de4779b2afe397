"""Images: asked for, uploaded, deleted when no VM needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from corral.api.bodies import Accepted, CreateImage
from corral.api.service.ground import bumped, changed, fingerprint_of
from corral.api.service.power import Powering
from corral.errors import NotFound, Problem, Refused
from corral.model import Image, ImagePhase, Task, Template, Vm
from corral.model.validate import accept, label_problems, name_problems, problems_of, timeout_problems
from corral.store.objects import Create

DEADLINE_S = 3600.0
"""A slow mirror, or a build under emulation; an upload that nobody sends."""
VERBS = {"build": "build", "catalogue": "fetch", "url": "fetch", "upload": "import"}


class Imaging(Powering):
    """``create_image``, ``upload_target``, ``delete_image``."""

    async def create_image(self, tree: Any, *, key: str = "") -> Accepted:
        """An image that is brought in, and the task of it (body: :class:`CreateImage` as a JSON tree).

        Raises Invalid, NotFound (project), Refused ``exists``, ``idempotency``.
        """
        body = accept(CreateImage, tree, "", _body_problems)
        await self.project(body.project)
        fingerprint = fingerprint_of("images", tree)
        earlier = await self.replay(key, body.project, fingerprint)
        if not earlier:
            image = Image(meta=self.meta(body.name, body.project, body.labels), spec=body.spec)
            task = self.task(
                VERBS[body.spec.source], image, deadline_s=body.timeout_s, key=key, fingerprint=fingerprint,
                default_s=DEADLINE_S,
            )  # fmt: skip
            try:
                made, begun = await self.commit([Create(image), Create(task)])
            except Refused:
                earlier = await self.replay(key, body.project, fingerprint)
                if not earlier:
                    raise
            else:
                assert isinstance(begun, Task)
                return Accepted(items=(made,), tasks=(begun,))
        try:
            items: tuple[Image, ...] = (await self.objects.get(Image, earlier[0].spec.target_id),)
        except NotFound:
            items = ()
        return Accepted(items=items, tasks=earlier)

    async def upload_target(self, ref: str, *, project: str = "default") -> tuple[Image, Task]:
        """The image that waits for its content, and its task. Refused ``wrong-phase`` when it does not wait."""
        image = await self.objects.find(Image, ref, project)
        if image.spec.source != "upload":
            raise Refused(f"image {image.meta.name} is not an upload", code="wrong-phase")
        if image.status.phase is not ImagePhase.PENDING or image.meta.deleted is not None:
            raise Refused(f"image {image.meta.name} is {image.status.phase}: it takes no content", code="wrong-phase")
        for task in (await self.objects.list(Task, image.meta.project)).items:
            if task.spec.target_id == image.meta.id and not task.status.state.final:
                return image, task
        raise Refused(
            f"the upload of {image.meta.name} has ended already", code="wrong-phase", hint="delete it and begin again"
        )

    async def delete_image(self, ref: str, *, project: str = "default", revision: int | None = None) -> None:
        """Ask for the end of an image; Refused ``in-use`` while a VM is made of it."""
        image = await self.objects.find(Image, ref, project)
        if revision is not None and image.meta.revision != revision:
            raise Refused(f"image {image.meta.name} has changed", code="stale", hint="read it again")
        self.retiring.add(image.meta.id)
        try:
            # From here on no request begins to use it; wait for those that have begun, then look.
            while image.meta.id in self.creating:
                await self.rt.clock.sleep(0.01)
            users = [vm for vm in (await self.objects.list(Vm)).items if vm.spec.image_id == image.meta.id]
            if users:
                names = ", ".join(vm.meta.name for vm in users[:5]) + (" …" if len(users) > 5 else "")
                raise Refused(
                    f"image {image.meta.name} is used by {len(users)} VM{'s' if len(users) > 1 else ''}: {names}",
                    code="in-use", hint="delete those first", vms=[vm.meta.name for vm in users[:100]],
                )  # fmt: skip
            asked = [t for t in (await self.objects.list(Template)).items if t.spec.image_id == image.meta.id]
            asked = [t for t in asked if not t.spec.auto]  # the platform's own go with their image
            if asked:
                raise Refused(
                    f"image {image.meta.name} is used by template {asked[0].meta.name}", code="in-use",
                    hint=f"delete that first: corral template delete {asked[0].meta.name}",
                )  # fmt: skip
            await self.objects.change(Image, image.meta.id, self._doomed)
        finally:
            self.retiring.discard(image.meta.id)

    def _doomed(self, image: Image) -> Image | None:
        """The agent removes the files, then the record."""
        if image.meta.deleted is not None:
            return None
        return changed(image, meta=msgspec.structs.replace(bumped(image.meta), deleted=self.rt.clock.now()))


def _body_problems(body: CreateImage) -> Iterator[Problem]:
    yield from name_problems(body.name)
    yield from name_problems(body.project, "project")
    yield from label_problems(body.labels)
    yield from timeout_problems(body.timeout_s)
    yield from problems_of(body.spec)
