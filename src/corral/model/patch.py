"""Changing part of an object: the merge, and paths as people write them. Pure, on JSON trees.

Of a VM people say ``disk.root.iops`` and ``nic.0.rate``; its spec has ``disk``, which is the root disk, and the list
``nics``.
"""

from __future__ import annotations

import re
from typing import Any

_INDEX = re.compile(r"\[(\d+)\]")


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386: objects merge, null removes, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def keys(path: str) -> list[str]:
    """The spec's own keys of a path as people, or errors (``spec.nics[0].rate``), write it; numbers are places in a
    list."""
    words = _INDEX.sub(r".\1", path.removeprefix("spec.")).split(".")
    if words[:2] == ["disk", "root"]:
        del words[1]
    if words[0] == "nic":
        words[0] = "nics"
    return words


def public(field: str) -> str:
    """The path that people write for a field of a spec, however it is named."""
    words = keys(field)
    if words[0] == "disk" and len(words) > 1:
        words.insert(1, "root")
    if words[0] == "nics" and len(words) > 1:
        words[0] = "nic"
    return ".".join(words)
