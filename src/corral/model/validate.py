"""Meaning: what a well-shaped object may say. One pass, every problem, nothing raised until the end.

``problems_of(spec)`` goes by the spec's class; names and labels have functions of their own. Limits stand here with
their reasons. What needs the store (does the image exist?) is the service's.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import AddressValueError, IPv4Address, ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

from corral.errors import Invalid, Problem
from corral.model.base import Struct
from corral.model.flavor import FlavorSpec
from corral.model.host import HostSpec
from corral.model.image import ImageSpec
from corral.model.network import NetworkSpec
from corral.model.project import ProjectSpec
from corral.model.shape import MAX_PROBLEMS, read
from corral.model.strict import shown
from corral.model.template import TemplateSpec
from corral.model.vm import Memory, Nic, VmSpec
from corral.units import GIB, KIB, MIB, format_size

T = TypeVar("T")
MAX_CPUS = 64
MAX_WEIGHT = 10_000
MIN_CORES = 0.01
"""A limit below this leaves a guest so little that it cannot even be shut down."""
MAX_CORES = 4096.0
MAX_SAVED_S = 86_400
"""A day of one core: what is saved for longer is no burst any more but another plan."""
MIN_MEMORY = 64 * MIB
"""Below this not even the smallest image boots."""
MAX_MEMORY = 1024 * GIB
MAX_BUDGET = 64 * 1024 * GIB
MAX_OVERCOMMIT = 10.0
"""Beyond this guests cannot even boot at the same time."""
MAX_DISK = 64 * 1024 * GIB
MIN_IOPS, MAX_IOPS = 10, 10_000_000
MIN_RATE, MAX_RATE = 64 * KIB, 64 * GIB
"""Bytes a second. With less than these a guest takes minutes to boot or to shut down; with more nothing is limited."""
MIN_BURST_S, MAX_BURST_S = 2, 3600
"""Below two seconds the hypervisor does not count the rate of a burst."""
MAX_NICS = 8
MAX_FORWARDS = 64
MAX_KEYS = 32
MAX_LABELS = 64
MAX_USER_DATA = 64 << 10
MAX_COUNT = 100
"""VMs of one request: they are written in one transaction."""
MAX_TIMEOUT_S = 86_400.0

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_REFERENCE = re.compile(r"(?:[a-z0-9][a-z0-9-]{0,62}/)?[a-z0-9][a-z0-9-]{0,62}")
_LABEL_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_HOSTNAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_CPU_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RECIPE = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}")
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_URL = re.compile(r"[!-~]{1,2048}")
_KEY = re.compile(
    r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)|sk-ssh-ed25519@openssh\.com"
    r"|sk-ecdsa-sha2-nistp256@openssh\.com) ([A-Za-z0-9+/]{16,8192}={0,2})(?: ([ -~]{0,256}))?"
)

Found = Iterator[Problem]


def accept(cls: type[T], tree: Any, path: str, *more: Callable[[T], Found]) -> T:
    """An object of ``cls`` from a JSON tree, right in shape and meaning. Raises :class:`Invalid` with all problems."""
    found, problems = read(cls, tree, path)
    wrong = [problem.field for problem in problems]
    for check in more:
        problems += [p for p in check(found) if not _under(p.field, wrong)]
    refuse(problems)
    return found


def _under(field: str, told: list[str]) -> bool:
    """Something has been said about this field, or what it is part of, already."""
    return any(field == one or field.startswith((f"{one}.", f"{one}[")) for one in told)


def refuse(problems: list[Problem]) -> None:
    """Raise what was found, if anything was."""
    if problems:
        raise Invalid(problems[:MAX_PROBLEMS])


def problems_of(spec: Struct, path: str = "spec") -> list[Problem]:
    """Everything that is wrong with the meaning of a spec."""
    return list(_CHECKS[type(spec)](spec, path))


def name_problems(name: str, field: str = "name", *, room: int = 0) -> Found:
    """``room``: characters that will be appended."""
    if not NAME.fullmatch(name):
        yield Problem(field, f"{shown(name)} is no name", "1 to 63 of a-z, 0-9 and -, not - at the ends")
    elif len(name) > 63 - room:
        yield Problem(field, f"{shown(name)} is too long to be numbered", f"at most {63 - room} characters")
    elif _UUID.fullmatch(name):
        yield Problem(field, "a name must not look like an id", "a word like web")


def label_problems(labels: dict[str, str], field: str = "labels") -> Found:
    if len(labels) > MAX_LABELS:
        yield Problem(field, f"has {len(labels)} labels", f"at most {MAX_LABELS}")
        return
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            yield Problem(field, f"{shown(key)} is no label key", "1 to 63 of A-Z a-z 0-9 . _ / -")
        elif len(value) > 256 or not value.isprintable():
            yield Problem(f"{field}.{key}", f"{shown(value)} is no label value", "up to 256 printable characters")


def timeout_problems(value: float | None, field: str = "timeout_s") -> Found:
    if value is not None and not 0 < value <= MAX_TIMEOUT_S:
        yield Problem(field, f"{value:g} is out of range", f"more than 0, at most {MAX_TIMEOUT_S:g} seconds")


def _range(value: int, low: int, high: int, field: str) -> Found:
    if not low <= value <= high:
        yield Problem(field, f"{value} is out of range", f"{low} to {high}")


def _bytes(value: int, low: int, high: int, field: str) -> Found:
    if not low <= value <= high:
        yield Problem(field, f"{value} bytes is out of range", f"{format_size(low)} to {format_size(high)}")
    elif value % MIB:
        yield Problem(field, f"{value} bytes is not aligned", "a multiple of 1 MiB (1048576 bytes)")


def _shares(weight: int, limit: float | None, reserve: float, most: float, path: str, fields: Iterable[str]) -> Found:
    """Weight, limit and reservation of CPU time, under these names. ``most``: cores that can be used at all."""
    names = [f"{path}.{field}" for field in fields]
    yield from _range(weight, 1, MAX_WEIGHT, names[0])
    if limit is not None and not MIN_CORES <= limit <= most:
        yield Problem(names[1], f"{limit:g} cores is out of range", f"{MIN_CORES:g} to {most:g}, or null for no limit")
        return
    ceiling = most if limit is None else limit
    if not 0 <= reserve <= ceiling:
        why = "" if limit is None else ": no more than the limit"
        yield Problem(names[2], f"{reserve:g} cores is out of range", f"0 to {ceiling:g}{why}")


def _disk_limits(spec: Any, path: str, prefix: str = "") -> Found:
    """Limits of a disk, whose fields have ``prefix`` in their names."""
    for name, low, high, shown_as in (
        ("iops", MIN_IOPS, MAX_IOPS, str),
        ("bandwidth", MIN_RATE, MAX_RATE, format_size),
    ):
        field, burst_field = f"{path}.{prefix}{name}", f"{path}.{prefix}{name}_burst"
        steady, burst = getattr(spec, f"{prefix}{name}"), getattr(spec, f"{prefix}{name}_burst")
        for where, value in ((field, steady), (burst_field, burst)):
            if value is not None and not low <= value <= high:
                expected = f"{shown_as(low)} to {shown_as(high)} a second, or null"
                yield Problem(where, f"{value} is out of range", expected)
        if burst is not None and steady is None:
            yield Problem(burst_field, "there is no limit that a burst could exceed", f"a value in {field} too")
        elif burst is not None and steady is not None and burst < steady:
            yield Problem(burst_field, f"{shown_as(burst)} is below the limit itself", f"at least {shown_as(steady)}")
    yield from _range(getattr(spec, f"{prefix}burst_s"), MIN_BURST_S, MAX_BURST_S, f"{path}.{prefix}burst_s")


def _burst(burst: float, limit: float | None, field: str) -> Found:
    if not 0 <= burst <= MAX_SAVED_S:
        yield Problem(field, f"{burst:g} CPU-seconds is out of range", f"0 to {MAX_SAVED_S}")
    elif burst and limit is None:
        yield Problem(field, "there is nothing to save below: it has no limit", "0, or a limit beside it")


def _memory(memory: Memory, path: str) -> Found:
    yield from _bytes(memory.size, MIN_MEMORY, MAX_MEMORY, f"{path}.size")
    yield from _range(memory.weight, 1, MAX_WEIGHT, f"{path}.weight")
    if memory.reserve is not None and not 0 <= memory.reserve <= memory.size:
        expected = f"0 to {format_size(memory.size)}, or null: no more than the size"
        yield Problem(f"{path}.reserve", f"{memory.reserve} bytes is out of range", expected)


def _line(value: str, field: str, most: int = 1024) -> Found:
    if len(value) > most or not value.isprintable():
        yield Problem(field, f"{shown(value)} is no line of text", f"up to {most} printable characters")


def _vm(spec: VmSpec, path: str) -> Found:
    if not _REFERENCE.fullmatch(spec.image):
        yield Problem(f"{path}.image", f"{shown(spec.image)} is no image's name", "a name like debian, or PROJECT/NAME")
    if spec.flavor is not None and not NAME.fullmatch(spec.flavor):
        yield Problem(f"{path}.flavor", f"{shown(spec.flavor)} is no flavor's name", "a name like small")
    yield from _range(spec.cpu.count, 1, MAX_CPUS, f"{path}.cpu.count")
    if spec.cpu.model is not None and not _CPU_MODEL.fullmatch(spec.cpu.model):
        yield Problem(f"{path}.cpu.model", f"{shown(spec.cpu.model)} is no CPU model", "a word like qemu64, or null")
    cpu = spec.cpu
    if 1 <= cpu.count <= MAX_CPUS:
        yield from _shares(cpu.weight, cpu.limit, cpu.reserve, cpu.count, f"{path}.cpu", ("weight", "limit", "reserve"))
    yield from _burst(cpu.burst, cpu.limit, f"{path}.cpu.burst")
    yield from _memory(spec.memory, f"{path}.memory")
    if spec.disk.size is not None:
        yield from _bytes(spec.disk.size, MIB, MAX_DISK, f"{path}.disk.size")
    yield from _disk_limits(spec.disk, f"{path}.disk")
    yield from _nics(spec.nics, f"{path}.nics")
    yield from _user_data(spec.user_data, f"{path}.user_data")
    if len(spec.ssh_keys) > MAX_KEYS:
        yield Problem(f"{path}.ssh_keys", f"has {len(spec.ssh_keys)} keys", f"at most {MAX_KEYS}")
    for number, key in enumerate(spec.ssh_keys[:MAX_KEYS]):
        if not public_key(key):
            expected = "TYPE BASE64 [COMMENT] on one line, without options"
            yield Problem(f"{path}.ssh_keys[{number}]", f"{shown(key)} is no OpenSSH public key", expected)
    if spec.hostname and not _HOSTNAME.fullmatch(spec.hostname):
        yield Problem(f"{path}.hostname", f"{shown(spec.hostname)} is no host name", "letters, digits, - and dots")


def _nics(nics: tuple[Nic, ...], path: str) -> Found:
    if len(nics) > MAX_NICS:
        yield Problem(path, f"has {len(nics)} cards", f"at most {MAX_NICS}")
        return
    macs: set[str] = set()
    taken: list[tuple[str, str, int]] = []
    for number, nic in enumerate(nics):
        where = f"{path}[{number}]"
        if not NAME.fullmatch(nic.network):
            yield Problem(f"{where}.network", f"{shown(nic.network)} is no network's name", "a name like user")
        if nic.mac:
            yield from _mac(nic.mac, macs, f"{where}.mac")
        if nic.rate is not None and not MIN_RATE <= nic.rate <= MAX_RATE:
            expected = f"{format_size(MIN_RATE)} to {format_size(MAX_RATE)} a second, or null"
            yield Problem(f"{where}.rate", f"{nic.rate} is out of range", expected)
        if len(nic.publish) > MAX_FORWARDS:
            yield Problem(f"{where}.publish", f"has {len(nic.publish)} ports", f"at most {MAX_FORWARDS}")
        for place, port in enumerate(nic.publish[:MAX_FORWARDS]):
            at = f"{where}.publish[{place}]"
            yield from _range(port.host, 0, 65535, f"{at}.host")
            yield from _range(port.guest, 1, 65535, f"{at}.guest")
            try:
                IPv4Address(port.address)
            except AddressValueError:
                yield Problem(f"{at}.address", f"{shown(port.address)} is no IPv4 address", "like 127.0.0.1")
            if port.host and any(
                port.protocol == protocol
                and port.host == host
                and (address == port.address or "0.0.0.0" in (address, port.address))
                for protocol, address, host in taken
            ):
                yield Problem(f"{at}.host", f"port {port.host}/{port.protocol} is published twice", "a port of its own")
            taken.append((port.protocol, port.address, port.host))


def _mac(mac: str, seen: set[str], field: str) -> Found:
    if not _MAC.fullmatch(mac):
        yield Problem(field, f"{shown(mac)} is no MAC address", "like 52:54:00:12:34:56")
    elif int(mac[:2], 16) & 1:
        yield Problem(field, f"{mac} is a group address", "a unicast one: the first byte is even")
    elif set(mac) <= {"0", ":"}:
        yield Problem(field, f"{mac} is no card's address", "like 52:54:00:12:34:56")
    elif mac.lower() in seen:
        yield Problem(field, f"{mac} is used twice", "an address of its own")
    seen.add(mac.lower())


def _user_data(text: str, field: str) -> Found:
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_USER_DATA:
        yield Problem(field, f"has {size} bytes", f"at most {MAX_USER_DATA}")
    if "\0" in text:
        yield Problem(field, "holds a NUL character", "text")


def public_key(line: str) -> bool:
    """Whether a line is an OpenSSH public key and nothing else: no options before it, its body says the same type."""
    match = _KEY.fullmatch(line)
    if match is None:
        return False
    try:
        body = base64.b64decode(match[2], validate=True)
    except binascii.Error:
        return False
    kind = match[1].encode()
    return body[: 4 + len(kind)] == len(kind).to_bytes(4) + kind and len(body) > 4 + len(kind)


def _image(spec: ImageSpec, path: str) -> Found:
    needs_recipe = spec.source in ("build", "catalogue")
    if needs_recipe and not _RECIPE.fullmatch(spec.recipe):
        yield Problem(f"{path}.recipe", f"{shown(spec.recipe)} is no recipe or entry", "a name like micro or debian-13")
    if not needs_recipe and spec.recipe:
        yield Problem(f"{path}.recipe", f"means nothing with source {spec.source}", "source build or catalogue")
    if spec.source == "url" or (spec.source == "catalogue" and spec.url):
        yield from _url(spec.url, f"{path}.url")
    elif spec.url:
        yield Problem(f"{path}.url", f"means nothing with source {spec.source}", "source url")
    if spec.source in ("url", "upload") and not spec.format:
        yield Problem(f"{path}.format", "is missing: formats are declared, never guessed", "raw, qcow2, vmdk or iso")
    if spec.source == "build" and spec.format:
        yield Problem(f"{path}.format", "means nothing with source build", "empty")
    if spec.checksum and not _CHECKSUM.fullmatch(spec.checksum):
        yield Problem(f"{path}.checksum", f"{shown(spec.checksum)} is no checksum", "sha256:HEX or sha512:HEX")
    yield from _line(spec.description, f"{path}.description")


def _url(url: str, field: str) -> Found:
    expected = "https://…, or http:// to this machine"
    if not _URL.fullmatch(url):
        yield Problem(field, f"{shown(url)} is no URL", expected)
        return
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        yield Problem(field, f"{shown(url)} is no URL", expected)
        return
    if parts.scheme not in ("https", "http") or not host:
        yield Problem(field, f"{shown(url)} is no address to fetch from", expected)
    elif parts.username is not None or parts.password is not None:
        yield Problem(field, "holds a user name or password", "a URL without credentials")
    elif parts.scheme == "http" and not _loopback(host):
        yield Problem(field, f"{shown(url)} is not encrypted", expected)


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _flavor(spec: FlavorSpec, path: str) -> Found:
    yield from _range(spec.cpus, 1, MAX_CPUS, f"{path}.cpus")
    yield from _bytes(spec.memory, MIN_MEMORY, MAX_MEMORY, f"{path}.memory")
    if 1 <= spec.cpus <= MAX_CPUS:
        yield from _shares(spec.weight, spec.limit, spec.reserve, spec.cpus, path, ("weight", "limit", "reserve"))
    yield from _burst(spec.burst, spec.limit, f"{path}.burst")
    if spec.disk is not None:
        yield from _bytes(spec.disk, MIB, MAX_DISK, f"{path}.disk")
    yield from _disk_limits(spec, path, "disk_")


def _template(spec: TemplateSpec, path: str) -> Found:
    if not _REFERENCE.fullmatch(spec.image):
        yield Problem(f"{path}.image", f"{shown(spec.image)} is no image's name", "a name like debian, or PROJECT/NAME")
    yield from _range(spec.cpus, 1, MAX_CPUS, f"{path}.cpus")
    if spec.cpu_model is not None and not _CPU_MODEL.fullmatch(spec.cpu_model):
        yield Problem(f"{path}.cpu_model", f"{shown(spec.cpu_model)} is no CPU model", "a word like qemu64, or null")
    yield from _bytes(spec.memory, MIN_MEMORY, MAX_MEMORY, f"{path}.memory")
    if spec.disk is not None:
        yield from _bytes(spec.disk, MIB, MAX_DISK, f"{path}.disk")
    # A fork's agent gives its one card another address; a second one would keep the template's.
    yield from _range(spec.cards, 0, 1, f"{path}.cards")


def _described(spec: Any, path: str) -> Found:
    yield from _line(spec.description, f"{path}.description")


def _project(spec: ProjectSpec, path: str) -> Found:
    yield from _described(spec, path)
    fields = ("cpu_weight", "cpu_limit", "cpu_reserve")
    yield from _shares(spec.cpu_weight, spec.cpu_limit, spec.cpu_reserve, MAX_CORES, path, fields)


def _host(spec: HostSpec, path: str) -> Found:
    if spec.memory_budget is not None and not MIN_MEMORY <= spec.memory_budget <= MAX_BUDGET:
        expected = f"{format_size(MIN_MEMORY)} to {format_size(MAX_BUDGET)}, or null"
        yield Problem(f"{path}.memory_budget", f"{spec.memory_budget} bytes is out of range", expected)
    if not 1.0 <= spec.memory_overcommit <= MAX_OVERCOMMIT:
        expected = f"1 (never more than there is) to {MAX_OVERCOMMIT:g}"
        yield Problem(f"{path}.memory_overcommit", f"{spec.memory_overcommit:g} is out of range", expected)


_CHECKS: dict[type[Struct], Callable[[Any, str], Found]] = {
    VmSpec: _vm, ImageSpec: _image, FlavorSpec: _flavor, HostSpec: _host, ProjectSpec: _project,
    NetworkSpec: _described, TemplateSpec: _template,
}  # fmt: skip
