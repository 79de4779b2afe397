"""``corral image …``: fetch, build and import what VMs boot from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from corral.cli import failures
from corral.cli.command import Command
from corral.cli.noun import noun
from corral.cli.obtain import finish, obtain
from corral.cli.output import Object, print_one
from corral.cli.parameters import DURATION
from corral.cli.progress import Transfer
from corral.cli.session import Session
from corral.client.record import BUILT
from corral.errors import CorralError, Invalid, Problem
from corral.units import format_size

image = noun("image", deletable=True)
_FORMATS = ("raw", "qcow2", "vmdk", "iso")
_ARCHES = ("x86_64", "aarch64", "riscv64")
_name = click.option("--name", "-n", help="What to call it here.")
_arch = click.option("--arch", type=click.Choice(_ARCHES), help="For which machine (default: this one's).")
_format = click.option("--format", "format_", type=click.Choice(_FORMATS), help="Its format: declared, never guessed.")
_checksum = click.option("--checksum", metavar="ALGORITHM:HEX", help="sha256:… or sha512:… of the file.")
_firmware = click.option("--firmware", type=click.Choice(("bios", "uefi")), help="What boots it.")
_wait = click.option("--wait/--no-wait", default=True, help="Return when it is ready (default), or at once.")
_timeout = click.option("--timeout", type=DURATION, metavar="TIME", help="Longest time it may take.")


def _spec(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value}


@image.command("build", cls=Command)
@click.argument("recipe", type=click.Choice(BUILT))
@_name
@_arch
@_wait
@_timeout
@click.pass_obj
def build(session: Session, recipe: str, name: str | None, arch: str | None, wait: bool, timeout: float | None) -> None:
    """Build an image on this machine, from Debian packages: micro (boots in a second) or debian."""
    spec = _spec(source="build", recipe=recipe, arch=arch)
    _make(session, name or recipe, spec, wait=wait, timeout=timeout)


@image.command("pull", cls=Command)
@click.argument("name")
@click.option("--from", "source", metavar="FILE|URL", help="Take it from here (default: the catalogue).")
@_format
@_checksum
@_arch
@_firmware
@_wait
@_timeout
@click.pass_obj
def pull(
    session: Session, name: str, source: str | None, format_: str | None, checksum: str | None, arch: str | None,
    firmware: str | None, wait: bool, timeout: float | None,
) -> None:  # fmt: skip
    """Fetch an image: a name of the catalogue, or with --from any file or URL."""
    more = _spec(checksum=checksum, arch=arch, firmware=firmware)
    if source is None:
        more.pop("firmware", None)
        _make(session, name, _spec(source="catalogue", recipe=name) | more, wait=wait, timeout=timeout)
    elif "://" in source:
        kind = format_ or format_of(source.partition("?")[0])
        _make(session, name, _spec(source="url", url=source, format=kind) | more, wait=wait, timeout=timeout)
    else:
        _send(
            session,
            Path(source),
            name,
            _spec(source="upload", format=format_ or format_of(source)) | more,
            wait=wait,
            timeout=timeout,
        )


@image.command("import", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@_name
@_format
@_checksum
@_arch
@_firmware
@_wait
@_timeout
@click.pass_obj
def import_(
    session: Session, file: Path, name: str | None, format_: str | None, checksum: str | None, arch: str | None,
    firmware: str | None, wait: bool, timeout: float | None,
) -> None:  # fmt: skip
    """Take in a disk image or ISO from a file of this machine."""
    fields = _spec(
        source="upload", format=format_ or format_of(str(file)), checksum=checksum, arch=arch, firmware=firmware
    )
    _send(session, file, name or file.stem.lower(), fields, wait=wait, timeout=timeout)


def format_of(name: str) -> str:
    """The format that a file's *name* declares (its content is never asked). Raises a usage error for other endings."""
    endings = {".qcow2": "qcow2", ".raw": "raw", ".img": "", ".vmdk": "vmdk", ".iso": "iso"}
    stem = name.removesuffix(".xz").removesuffix(".gz").removesuffix(".zst")
    found = endings.get(Path(stem).suffix.lower(), "")
    if not found:
        raise click.UsageError(
            f"the name {name!r} does not say which format it has; give --format {'|'.join(_FORMATS)}"
        )
    return found


def _make(session: Session, name: str, spec: dict[str, Any], *, wait: bool, timeout: float | None) -> None:
    """Ask for the image and wait for it. One that is ready already is the answer as it is."""
    made, tasks = obtain(session, name, spec, timeout)
    _finish(session, made, tasks, wait=wait)


def _send(
    session: Session, file: Path, name: str, spec: dict[str, Any], *, wait: bool, timeout: float | None
) -> None:  # fmt: skip
    """Upload a file as an image's content."""
    if not file.is_file():
        what = "it is not a regular file" if file.exists() else "there is no such file"
        raise Invalid([Problem(str(file), what)])
    size = file.stat().st_size
    accepted = session.create("image", name=name, spec=spec, timeout_s=timeout)
    made = accepted.items[0]
    try:
        with file.open("rb") as content, Transfer(f"{name}: sending", size) as progress:
            session.upload(made["meta"]["id"], content, size, progress.add)
    except BaseException:
        with suppress(CorralError):  # what broke the upload is the answer
            session.delete("image", made["meta"]["id"])
        raise
    _finish(session, made, accepted.tasks, wait=wait)


def _finish(session: Session, made: Object, tasks: Sequence[Object], *, wait: bool) -> None:
    if wait:
        made = finish(session, made, tasks)
    name, status = failures.clean(made["meta"]["name"]), made["status"]
    size = f" ({format_size(status['size'])})" if status.get("size") else ""
    note = f": {failures.clean(status['reason'])}" if status.get("reason") else ""
    print_one(made, session.output, f"{name}: {status['phase']}{size}{note}")
