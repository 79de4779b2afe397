"""The seed: a small CD (label ``cidata``, cloud-init's NoCloud layout) that tells a fresh guest who it is.

Written by serializer, from values that match strict patterns: nothing a user typed becomes another line or key.
YAML readers take JSON, so meta-data is JSON. Beside cloud-init's files, ``corral/`` holds the same as plain files for
guests that have a shell and no cloud-init (:mod:`corral.images` puts ``corral-init`` into those).
"""

from __future__ import annotations

import io
import re

import msgspec
import pycdlib
from pycdlib.pycdlibexception import PyCdlibException

from corral.errors import CorralError, Invalid, Problem
from corral.units import KIB

MAX_USER_DATA = 64 * KIB
MAX_KEYS = 64
_HOSTNAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_INSTANCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
_KEY = re.compile(
    r"(?:ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)|sk-(?:ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)"
    r" [A-Za-z0-9+/]{16,16384}={0,3}(?: [\x20-\x7e]{0,256})?",
    re.ASCII,
)
"""A public key without options, with a printable comment."""
_NO_USER_DATA = "#cloud-config\n{}\n"
"""cloud-init wants the file to exist."""


class Seed(msgspec.Struct, frozen=True, kw_only=True):
    """Who a guest is to be at its first start. ``instance_id``: another one makes user data run again."""

    instance_id: str
    hostname: str
    user_data: str = ""
    ssh_keys: tuple[str, ...] = ()
    default_user: str = "root"


def check_seed(seed: Seed) -> None:
    """Raise :class:`~corral.errors.Invalid` with everything that is wrong."""
    problems: list[Problem] = []
    if not _INSTANCE_ID.fullmatch(seed.instance_id):
        problems.append(Problem("instance_id", "is not an instance id", "letters, digits, dots and dashes"))
    if not _HOSTNAME.fullmatch(seed.hostname):
        problems.append(Problem("hostname", "is not a host name", "lower-case letters, digits and dashes, at most 63"))
    if not _USER.fullmatch(seed.default_user):
        problems.append(Problem("default_user", "is not a user name", "like debian"))
    if len(seed.ssh_keys) > MAX_KEYS:
        problems.append(Problem("ssh_keys", f"has {len(seed.ssh_keys)} keys", f"at most {MAX_KEYS}"))
    problems += [
        Problem(f"ssh_keys[{number}]", "is not a public SSH key without options", "like ssh-ed25519 AAAA… name")
        for number, key in enumerate(seed.ssh_keys)
        if not _KEY.fullmatch(key.strip())
    ]
    try:
        size = len(seed.user_data.encode())
    except UnicodeEncodeError:
        problems.append(Problem("user_data", "is not text (UTF-8)"))
    else:
        if size > MAX_USER_DATA:
            problems.append(Problem("user_data", f"has {size} bytes", f"at most {MAX_USER_DATA}"))
        if "\0" in seed.user_data:
            problems.append(Problem("user_data", "holds a NUL character", "text"))
    if problems:
        raise Invalid(problems)


def seed_files(seed: Seed) -> dict[str, bytes]:
    """The files of the CD: path → content. Raises Invalid."""
    check_seed(seed)
    keys = [key.strip() for key in seed.ssh_keys]
    meta = {"instance-id": seed.instance_id, "local-hostname": seed.hostname, "public-keys": keys}
    return {
        "meta-data": msgspec.json.format(msgspec.json.encode(meta), indent=1) + b"\n",
        "user-data": (seed.user_data or _NO_USER_DATA).encode(),
        "corral/instance-id": seed.instance_id.encode() + b"\n",
        "corral/hostname": seed.hostname.encode() + b"\n",
        "corral/authorized_keys": "".join(f"{key}\n" for key in keys).encode(),
        "corral/default-user": seed.default_user.encode() + b"\n",
        "corral/user-data": seed.user_data.encode(),
    }


def seed_iso(seed: Seed) -> bytes:
    """The CD itself, about 400 KiB. Raises Invalid."""
    files = seed_files(seed)
    try:
        iso = pycdlib.PyCdlib()
        iso.new(interchange_level=3, vol_ident="cidata", joliet=3, rock_ridge="1.09")
        iso.add_directory("/CORRAL", rr_name="corral", joliet_path="/corral")
        for number, (path, content) in enumerate(files.items()):
            folder = "/CORRAL" if "/" in path else ""
            iso.add_fp(
                io.BytesIO(content),
                len(content),
                f"{folder}/F{number}.;1",
                rr_name=path.rpartition("/")[2],
                joliet_path=f"/{path}",
            )
        out = io.BytesIO()
        iso.write_fp(out)
        iso.close()
    except PyCdlibException as error:
        raise CorralError(f"the seed CD cannot be written: {error}") from error
    return out.getvalue()
