"""WHAT exists: the kinds, their fields, defaults and validation. No I/O, no clock, no asyncio.

Every object is ``{kind, meta, spec, status}``: *spec* is wanted and written by users, *status* is seen and written by
its one owner. The one table of kinds is :data:`corral.model.kinds.KINDS`: key prefixes, API routes, CLI nouns and
columns all come from it.
"""

from corral.model.base import Meta, Resource
from corral.model.flavor import Flavor, FlavorSpec
from corral.model.host import Accelerator, Host, HostSpec, HostStatus
from corral.model.image import Image, ImagePhase, ImageSpec, ImageStatus
from corral.model.kinds import KINDS, Kind, kind_of
from corral.model.network import Network, NetworkSpec
from corral.model.project import Project, ProjectSpec
from corral.model.record import Event, EventSpec, Step, Task, TaskSpec, TaskState, TaskStatus
from corral.model.template import Template, TemplatePhase, TemplateSpec, TemplateStatus
from corral.model.vm import Cpu, Disk, Forward, Memory, Nic, OnHang, Phase, Power, Restart, Vm, VmSpec, VmStatus
from corral.model.volume import Volume, VolumeSpec, VolumeStatus

__all__ = [
    "KINDS", "Accelerator", "Cpu", "Disk", "Event", "EventSpec", "Flavor", "FlavorSpec", "Forward", "Host", "HostSpec",
    "HostStatus", "Image", "ImagePhase", "ImageSpec", "ImageStatus", "Kind", "Memory", "Meta", "Network",
    "NetworkSpec", "Nic", "OnHang", "Phase", "Power", "Project", "ProjectSpec", "Resource", "Restart", "Step", "Task",
    "TaskSpec", "TaskState", "TaskStatus", "Template", "TemplatePhase", "TemplateSpec", "TemplateStatus", "Vm",
    "VmSpec", "VmStatus", "Volume", "VolumeSpec", "VolumeStatus", "kind_of",
]  # fmt: skip
