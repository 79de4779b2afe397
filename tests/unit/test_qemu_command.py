"""QEMU's command line: what stands in it, and that no text from outside can add to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.engine.protocol import Card, Drive, HostForward, KernelBoot, Layer, Limits, Machine
from corral.engine.qemu.command import FREE_PORTS, SOCKETS, Surroundings, build
from corral.engine.qemu.firmware import Firmware
from corral.errors import CorralError, Invalid

ID = "11111111-2222-4333-8444-555555555555"
FDS = {name: 10 + number for number, name in enumerate(SOCKETS)}
TCG = Surroundings(accelerator="tcg", sockets=FDS, binary="/usr/bin/qemu-system-x86_64")


def machine(**more: Any) -> Machine:
    root = Drive(
        name="root",
        path=Path("/v/root.qcow2"),
        format="qcow2",
        layers=(Layer(path=Path("/i/disk.qcow2"), format="qcow2"),),
        bootable=True,
    )
    seed = Drive(name="seed", path=Path("/v/seed.iso"), format="raw", readonly=True)
    forward = HostForward(protocol="tcp", address="127.0.0.1", host=8080, guest=80)
    card = Card(name="nic0", mac="52:54:00:12:34:56", hostname="web", forwards=(forward,))
    fields = {"id": ID, "name": "web", "cpus": 2, "memory": 512 << 20, "drives": (root, seed), "cards": (card,)}
    return Machine(**(fields | more))  # type: ignore[arg-type]


def pairs(argv: list[str]) -> list[tuple[str, str]]:
    """Options and their values as QEMU reads them: an option takes the next word, whatever that looks like."""
    found, words = [], iter(argv[1:])
    for option in words:
        assert option.startswith("-"), f"{option!r} is not where an option belongs"
        found.append((option, "" if option in ("-nodefaults", "-no-user-config", "-S") else next(words)))
    return found


def values(argv: list[str], option: str) -> list[str]:
    return [value for name, value in pairs(argv) if name == option]


def objects(argv: list[str], option: str) -> list[dict[str, Any]]:
    return [json.loads(value) for value in values(argv, option) if value.startswith("{")]


def one(argv: list[str], option: str, **wanted: object) -> dict[str, Any]:
    (found,) = [item for item in objects(argv, option) if wanted.items() <= item.items()]
    return found


def test_the_frame_of_every_machine() -> None:
    argv = build(machine(), TCG)
    assert argv[:5] == ["/usr/bin/qemu-system-x86_64", "-name", "guest=web", "-uuid", ID]
    assert {"-nodefaults", "-no-user-config", "-S"} <= set(argv)
    assert values(argv, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert values(argv, "-display") == ["none"]
    assert values(argv, "-accel") == ["tcg,thread=multi,tb-size=32"]
    assert values(argv, "-smp") == ["cpus=2,sockets=1,cores=2,threads=1"]
    assert values(argv, "-m") == ["size=524288k"]
    assert values(argv, "-action") == ["reboot=reset,shutdown=poweroff,panic=pause,watchdog=reset"]
    assert values(argv, "-machine")[0].startswith("q35,")
    assert "-netdev" in argv
    assert "-vnc" not in argv


def test_memory_is_private_and_never_merged() -> None:
    argv = build(machine(), TCG)
    backend = one(argv, "-object", id="mem")
    assert (backend["qom-type"], backend["size"]) == ("memory-backend-ram", 512 << 20)
    assert (backend["share"], backend["merge"]) == (False, False)
    assert ",memory-backend=mem" in values(argv, "-machine")[0]


def test_a_disk_is_a_throttled_chain_whose_formats_are_stated() -> None:
    argv = build(machine(), TCG)
    top = one(argv, "-blockdev", **{"node-name": "root"})
    assert (top["driver"], top["throttle-group"]) == ("throttle", "limits-root")
    assert one(argv, "-object", **{"qom-type": "throttle-group", "id": "limits-root"})
    overlay = top["file"]
    assert (overlay["driver"], overlay["file"]["filename"]) == ("qcow2", "/v/root.qcow2")
    base = overlay["backing"]
    assert (base["driver"], base["read-only"], base["backing"]) == ("qcow2", True, None)
    assert base["file"]["filename"] == "/i/disk.qcow2"
    assert one(argv, "-device", id="disk-root")["drive"] == "root"


def test_the_limits_of_a_disk_are_there_from_the_start() -> None:
    limits = Limits(iops=500, bandwidth=10 << 20, bandwidth_burst=40 << 20, burst_s=3)
    drive = Drive(name="root", path=Path("/v/root.qcow2"), format="qcow2", limits=limits)
    group = one(build(machine(drives=(drive,)), TCG), "-object", id="limits-root")
    assert group["limits"] == {
        "iops-total": 500, "iops-total-max": 0, "iops-total-max-length": 1,
        "bps-total": 10 << 20, "bps-total-max": 40 << 20, "bps-total-max-length": 3,
    }  # fmt: skip
    assert "limits" not in one(build(machine(), TCG), "-object", id="limits-root")


def test_a_qcow2_without_a_recorded_base_opens_none_whatever_its_header_says() -> None:
    drive = Drive(name="data", path=Path("/v/data.qcow2"), format="qcow2")
    argv = build(machine(drives=(drive,)), TCG)
    form = one(argv, "-blockdev", **{"node-name": "data"})["file"]
    assert form["backing"] is None
    assert "backing" in form


def test_readonly_drives_are_opened_readonly_all_the_way_down() -> None:
    argv = build(machine(), TCG)
    top = one(argv, "-blockdev", **{"node-name": "seed"})
    assert top["read-only"]
    assert top["file"]["read-only"]
    assert top["file"]["file"]["read-only"]
    assert "detect-zeroes" not in top["file"]


def test_a_cdrom_is_scsi_since_cloud_kernels_see_no_sata() -> None:
    cd = Drive(name="installer", path=Path("/i/cd.iso"), format="raw", readonly=True, cdrom=True, bootable=True)
    argv = build(machine(drives=(cd,)), TCG)
    assert one(argv, "-device", id="disk-installer")["driver"] == "scsi-cd"
    assert one(argv, "-device", id="scsi")["driver"] == "virtio-scsi-pci"
    assert not any(device["driver"] == "virtio-scsi-pci" for device in objects(build(machine(), TCG), "-device"))


def test_every_device_has_an_address_of_its_own_and_free_ports_remain() -> None:
    devices = objects(build(machine(), TCG), "-device")
    places = [(device["bus"], device["addr"]) for device in devices if "addr" in device]
    assert len(set(places)) == len(places)
    ports = [device["id"] for device in devices if device["driver"] == "pcie-root-port"]
    used = {device.get("bus") for device in devices} & set(ports)
    assert len(set(ports) - used) == FREE_PORTS
    assert all(f"free{number}" in ports for number in range(FREE_PORTS))
    chassis = [device["chassis"] for device in devices if "chassis" in device]
    assert len(set(chassis)) == len(chassis)


def test_the_guests_channels() -> None:
    argv = build(machine(), TCG)
    assert values(argv, "-chardev") == [f"socket,id={name},fd={FDS[name]},server=on,wait=off" for name in SOCKETS]
    assert values(argv, "-mon") == ["chardev=qmp,mode=control"]
    names = {item["name"]: item["chardev"] for item in objects(argv, "-device") if item["driver"] == "virtserialport"}
    assert names == {"org.corral.guest.0": "guest", "org.qemu.guest_agent.0": "qga"}
    assert one(argv, "-device", driver="isa-serial")["chardev"] == "serial"


def test_a_card_is_user_mode_with_its_forwards_and_no_option_rom() -> None:
    argv = build(machine(), TCG)
    netdev = one(argv, "-netdev", id="net-nic0")
    assert netdev == {
        "type": "user", "id": "net-nic0", "hostname": "web", "hostfwd": [{"str": "tcp:127.0.0.1:8080-:80"}],
    }  # fmt: skip
    device = one(argv, "-device", id="nic-nic0")
    assert (device["driver"], device["mac"], device["romfile"]) == ("virtio-net-pci", "52:54:00:12:34:56", "")


def test_direct_kernel_boot() -> None:
    boot = KernelBoot(kernel=Path("/i/vmlinux"), initrd=Path("/i/initrd"), cmdline="console=ttyS0 quiet")
    argv = build(machine(kernel=boot, drives=()), TCG)
    assert (values(argv, "-kernel"), values(argv, "-initrd")) == (["/i/vmlinux"], ["/i/initrd"])
    assert values(argv, "-append") == ["console=ttyS0 quiet"]


def test_the_kernel_keeps_boot_index_zero_for_itself() -> None:
    assert one(build(machine(), TCG), "-device", id="disk-root")["bootindex"] == 1


def test_uefi_has_code_for_all_and_variables_of_its_own() -> None:
    firmware = Firmware(Path("/usr/share/OVMF/code.fd"), Path("/usr/share/OVMF/vars.fd"))
    around = Surroundings("tcg", FDS, "/q", firmware, Path("/v/nvram.fd"))
    argv = build(machine(firmware="uefi"), around)
    code, variables = (
        one(argv, "-blockdev", **{"node-name": "pflash-code"}),
        one(argv, "-blockdev", **{"node-name": "pflash-vars"}),
    )
    assert (code["read-only"], code["file"]["filename"]) == (True, "/usr/share/OVMF/code.fd")
    assert (variables["read-only"], variables["file"]["filename"]) == (False, "/v/nvram.fd")
    assert "pflash0=pflash-code,pflash1=pflash-vars" in values(argv, "-machine")[0]


def test_cpu_models_follow_the_accelerator_and_the_wish() -> None:
    kvm = Surroundings("kvm", FDS, "/q")
    assert values(build(machine(), TCG), "-cpu") == ["qemu64,+rdrand"]
    assert values(build(machine(), kvm), "-cpu") == ["host"]
    assert values(build(machine(), kvm), "-accel") == ["kvm"]
    assert values(build(machine(cpu_model="Haswell,-avx2"), kvm), "-cpu") == ["Haswell,-avx2"]


@pytest.mark.parametrize("arch", ["aarch64", "riscv64"])
def test_other_architectures_have_no_pc_devices(arch: str) -> None:
    argv = build(machine(arch=arch, drives=()), Surroundings("tcg", FDS, f"/usr/bin/qemu-system-{arch}"))
    drivers = {device["driver"] for device in objects(argv, "-device")}
    assert values(argv, "-machine")[0].startswith("virt,")
    assert not drivers & {"isa-serial", "pvpanic", "vmgenid"}
    assert values(argv, "-serial") == ["chardev:serial"]


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(CorralError) as caught:
        build(machine(arch="m68k"), TCG)
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("id", "not-a-uuid", "id"),
        ("id", f"{ID},file=/dev/sda", "id"),
        ("cpus", 0, "cpus"),
        ("memory", 0, "memory"),
        ("memory", 4097 << 10 | 1, "memory"),
        ("cpu_model", "-help", "cpu_model"),
        ("cpu_model", "host\n-device", "cpu_model"),
        ("kernel", KernelBoot(kernel=Path("relative")), "kernel"),
        ("kernel", KernelBoot(kernel=Path("/k"), cmdline="a\0b"), "kernel.cmdline"),
        ("drives", (Drive(name="a,b=c", path=Path("/d"), format="raw"),), "drives.name"),
        ("drives", (Drive(name="a", path=Path("nbd:host"), format="raw"),), "drives.path"),
        ("drives", (Drive(name="a", path=Path("/d"), format="raw"),) * 2, "drives"),
        ("drives", (Drive(name="a", path=Path("/d"), format="raw", cdrom=True),), "drives.readonly"),
        ("cards", (Card(name="n", mac="52:54:00:12:34:5x", hostname=""),), "cards.mac"),
        ("cards", (Card(name="n", mac="52:54:00:12:34:56", hostname="a b"),), "cards.hostname"),
    ],
)
def test_what_cannot_be_built_is_named(field: str, value: object, named: str) -> None:
    with pytest.raises(Invalid) as caught:
        build(machine(**{field: value}), TCG)
    assert named in {problem.field for problem in caught.value.problems}


def test_all_problems_come_at_once() -> None:
    forward = HostForward(protocol="tcp", address="::1", host=0, guest=1)
    bad = machine(cpus=0, memory=1, cards=(Card(name="N", mac="", hostname="", forwards=(forward,)),))
    with pytest.raises(Invalid) as caught:
        build(bad, TCG)
    assert {"cpus", "memory", "cards.name", "cards.mac", "ports"} == {p.field for p in caught.value.problems}


HOSTILE = st.one_of(
    st.text(max_size=80),
    st.sampled_from(
        ["x,file=/dev/sda", "-device", "x\n-device", '{"driver":"file"}', '"},{"', "x,,y", "--", "-S", '\\"', "${HOME}"]
    ),
)


@settings(max_examples=60, deadline=None)
@given(name=HOSTILE, file=HOSTILE, cmdline=HOSTILE, hostname=HOSTILE, device=HOSTILE, model=HOSTILE)
def test_hostile_text_stays_in_the_one_value_that_it_is(
    name: str, file: str, cmdline: str, hostname: str, device: str, model: str
) -> None:
    """Whatever is written into a machine, the arguments keep their shape, or the machine is refused."""
    drive = Drive(name="root", path=Path("/v") / f"x{file}", format="raw", bootable=True)
    boot = KernelBoot(kernel=Path(f"/k{file}"), cmdline=cmdline)
    card = Card(name="nic0", mac="52:54:00:12:34:56", hostname=hostname)
    wishes: list[dict[str, Any]] = [
        {"name": name, "drives": (drive,), "kernel": boot},
        {"cards": (card,)},
        {"drives": (Drive(name=device, path=Path("/v/x"), format="raw", bootable=True),)},
        {"cpu_model": model},
    ]
    calm: list[dict[str, Any]] = [
        {"drives": (Drive(name="root", path=Path("/x"), format="raw", bootable=True),),
         "kernel": KernelBoot(kernel=Path("/k"))},
        {"cards": (Card(name="nic0", mac="52:54:00:12:34:56", hostname="x"),)},
        {"drives": (Drive(name="root", path=Path("/x"), format="raw", bootable=True),)},
        {"cpu_model": "max"},
    ]  # fmt: skip
    for wish, model_of_it in zip(wishes, calm, strict=True):
        try:
            argv = build(machine(**wish), TCG)
        except Invalid:
            continue
        assert [option for option, _ in pairs(argv)] == [
            option for option, _ in pairs(build(machine(**model_of_it), TCG))
        ]
        assert values(argv, "-uuid") == [ID]
        assert "," not in values(argv, "-name")[0]
        assert values(argv, "-smbios")[0].count(",") == 4
        for option in ("-blockdev", "-netdev", "-object", "-device"):
            assert len(objects(argv, option)) == len(values(argv, option))
        if "kernel" in wish:
            assert one(argv, "-blockdev", **{"node-name": "root"})["file"]["file"]["filename"] == str(drive.path)
            assert values(argv, "-append") == [cmdline]
        assert not any("\0" in word for word in argv)
