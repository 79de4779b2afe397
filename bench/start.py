"""How long from the request to the guest agent's answer: Corral against raw QEMU with the very same command line.

Method. One daemon, image `micro`. The command line of a VM that Corral started is read from /proc/PID/cmdline; the raw arm starts exactly
that (own sockets, no daemon, no launcher) and waits for the agent's announcement on its socket. Arms alternate; each arm's time runs from just
before the request (`corral launch` as a whole process; `corral` through the Python client; Popen for raw) to the answer. CPU seconds are those of the QEMU process
at that moment plus, for Corral, of the daemon and the command. With --libvirt a third arm starts a domain with the same kernel by `virsh start`.
Prints medians and the ratio to raw.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.integration.platform import CORRAL, Platform


def cpu_of(pid: int) -> float:
    """CPU seconds used by all threads of a process, and by children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(fields[i]) for i in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def template_of(platform: Platform) -> tuple[list[str], Path]:
    """Command line and run directory of a VM as Corral starts it."""
    platform.run("launch", "micro", "--name", "pattern", "--memory", "256M")
    pid = platform.vm("pattern")["status"]["pid"]
    argv = [part.decode() for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    return argv, Path(os.readlink(f"/proc/{pid}/cwd"))


def without_ports(argv: list[str]) -> list[str]:
    """The same command line with no forwarded host ports (they would be taken)."""
    out = []
    for part in argv:
        if part.startswith("{") and '"hostfwd"' in part:
            part = json.dumps({k: v for k, v in json.loads(part).items() if k != "hostfwd"})
        elif part.startswith("user,"):
            part = ",".join(p for p in part.split(",") if not p.startswith("hostfwd="))
        out.append(part)
    return out


def raw(argv: list[str], like: Path) -> tuple[float, float]:
    """Start QEMU by hand in a directory of its own; seconds to the agent's first bytes, CPU seconds of QEMU then."""
    directory = Path(tempfile.mkdtemp(prefix="corral-raw-", dir="/tmp"))
    for extra in like.iterdir():
        if extra.is_file() and extra.suffix in (".fd", ".iso", ".qcow2"):
            shutil.copy(extra, directory)
    argv = [re.sub(r"fd=\d+,server", f"path={(m := re.search('id=([a-z]+)', part)) and m[1]}.sock,server", part)
            if part.startswith("socket,") else part for part in argv if part != "-S"]  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(argv, cwd=directory, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        serial, agent = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        for connection, name in ((serial, "serial.sock"), (agent, "guest.sock")):
            while True:
                try:
                    connection.connect(str(directory / name))
                    break
                except OSError:
                    assert process.poll() is None, "raw QEMU ended"
                    time.sleep(0.002)
        agent.settimeout(60)
        assert agent.recv(1)
        return time.monotonic() - started, cpu_of(process.pid)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


def corral(platform: Platform, daemon: int, name: str) -> tuple[float, float]:
    cpu, own, started = cpu_of(daemon), children_cpu(), time.monotonic()
    platform.run("launch", "micro", "--name", name, "--memory", "256M")
    took = time.monotonic() - started
    used = cpu_of(platform.vm(name)["status"]["pid"]) + cpu_of(daemon) - cpu + children_cpu() - own
    platform.run("delete", name, "--force")
    return took, used


def client(platform: Platform, daemon: int, name: str) -> tuple[float, float]:
    """The same through the Python client: without the start of a Python process."""
    import corral.sync

    with corral.sync.connect(state=platform.state) as connection:
        cpu, started = cpu_of(daemon), time.monotonic()
        vm = connection.vms.launch("micro", name=name, memory="256M")
        took = time.monotonic() - started
        used = cpu_of(vm["status"]["pid"]) + cpu_of(daemon) - cpu
        connection.vms.delete(name, force=True)
    return took, used


def libvirt(argv: list[str], platform: Platform, number: int) -> tuple[float, float]:
    """``virsh start`` of a domain with the same kernel, initrd, memory and agent port; its own devices."""
    kernel, initrd = argv[argv.index("-kernel") + 1], argv[argv.index("-initrd") + 1]
    append = argv[argv.index("-append") + 1]
    directory = Path(tempfile.mkdtemp(prefix="corral-virsh-", dir="/tmp"))
    directory.chmod(0o777)
    for file in (kernel, initrd):
        shutil.copy(file, directory)
    path = directory / "guest.sock"
    domain = f"""<domain type='qemu'><name>corral-bench-{number}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{directory / Path(kernel).name}</kernel><initrd>{directory / Path(initrd).name}</initrd>
<cmdline>{append.replace("&", "&amp;").replace("<", "&lt;")}</cmdline></os><features><acpi/></features><cpu mode='custom' match='exact'><model fallback='allow'>qemu64</model></cpu>
<devices><serial type='null'/><memballoon model='virtio'/><rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
<interface type='user'><model type='virtio'/></interface>
<channel type='unix'><source mode='bind' path='{path}'/><target type='virtio' name='org.corral.guest.0'/></channel></devices></domain>"""
    (directory / "domain.xml").write_text(domain)
    virsh = ["virsh", "--connect", "qemu:///system", "--quiet"]
    subprocess.run([*virsh, "define", str(directory / "domain.xml")], check=True, capture_output=True)
    own = children_cpu()
    started = time.monotonic()
    try:
        subprocess.run([*virsh, "start", f"corral-bench-{number}"], check=True, capture_output=True)
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(str(path))
            agent.settimeout(60)
            assert agent.recv(1)
        took = time.monotonic() - started
        pid = next(
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit() and f"guest=corral-bench-{number}".encode() in (p / "cmdline").read_bytes()
        )
        return took, cpu_of(pid) + children_cpu() - own
    finally:
        subprocess.run([*virsh, "destroy", f"corral-bench-{number}"], check=False, capture_output=True)
        subprocess.run([*virsh, "undefine", f"corral-bench-{number}"], check=False, capture_output=True)
        shutil.rmtree(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs of each arm (default 10)")
    parser.add_argument("--libvirt", action="store_true", help="third arm: virsh start (libvirtd must run)")
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {}
    with Platform() as platform:
        daemon = platform.up()
        platform.run("image", "build", "micro", timeout=300)
        argv, like = template_of(platform)
        argv = without_ports(argv)
        for number in range(options.runs + 1):
            arms = {
                "raw QEMU": lambda: raw(argv, like),
                "corral launch": lambda n=number: corral(platform, daemon, f"cli-{n}"),
                "corral client": lambda n=number: client(platform, daemon, f"api-{n}"),
            }
            if options.libvirt:
                arms["virsh start"] = lambda n=number: libvirt(argv, platform, n)
            for name, arm in arms.items():
                figures = arm()
                if number:  # the first round warms caches
                    results.setdefault(name, []).append(figures)
            print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    base = statistics.median(took for took, _ in results["raw QEMU"])
    print(
        f"{'arm':15} {'median s':>9} {'min':>7} {'max':>7} {'CPU s':>7} {'ratio':>7}   ({options.runs} alternating runs, {CORRAL.name}, micro 256M)"
    )
    for name, figures in results.items():
        times = [took for took, _ in figures]
        middle, cpu = statistics.median(times), statistics.median(used for _, used in figures)
        print(f"{name:15} {middle:9.3f} {min(times):7.3f} {max(times):7.3f} {cpu:7.2f} {middle / base:7.2f}")


main()
