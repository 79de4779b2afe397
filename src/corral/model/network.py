"""A network that NICs are plugged into. Now only ``user``: QEMU's own NAT, which needs no privileges."""

from __future__ import annotations

from typing import ClassVar, Literal

from corral.model.base import Resource, Struct


class NetworkSpec(Struct, frozen=True, kw_only=True):
    mode: Literal["user"] = "user"
    cidr: str = "10.0.2.0/24"
    description: str = ""


class Network(Resource, frozen=True, kw_only=True, tag_field="kind", tag="network"):
    KIND: ClassVar[str] = "network"
    spec: NetworkSpec = NetworkSpec()
