"""The last steps before QEMU: a program of its own, run as ``python -I -S launch.py OPTIONS -- QEMU ARGUMENTS``.

Doing this between fork and exec of the daemon would copy the daemon's page tables and could deadlock on its locks. So
the daemon starts this small script (standard library only, no site), which confines itself and becomes QEMU. Its own
arguments end with QEMU's, so whoever looks for ``-uuid ID`` finds the machine at every moment.

Options, as ``key=value``: ``uid`` (also the gid; absent: stay who we are), ``groups``, ``namespaces=1``,
``writable=DIR`` (repeated; the rest of the file system becomes read-only), ``device=PATH`` (repeated; nothing else is
in /dev), ``join=FILE`` (repeated; a control group's ``cgroup.procs``), ``report=FD`` (where QEMU's pid is written),
``mortal=1`` (die when the parent dies), ``spare=1`` (punch no holes, see :func:`spare_files`).
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import struct
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_PARENT = 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x8000
MS_NOSUID, MS_NOEXEC, MS_BIND, MS_REC, MS_SLAVE, MS_NODEV = 2, 8, 0x1000, 0x4000, 0x80000, 4
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220}
SYS_MOUNT_SETATTR = 442
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
FALLOCATE = {"x86_64": (0xC000003E, 285), "aarch64": (0xC00000B7, 47), "riscv64": (0xC00000F3, 47)}
"""AUDIT_ARCH_… and the number of the call."""
FALLOC_FL_PUNCH_HOLE = 2
BPF_LOAD, BPF_EQUAL, BPF_AND, BPF_RETURN = 0x20, 0x15, 0x54, 0x06
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
LAST_CAPABILITY = 40

libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    pass


def check(what: str, result: int) -> int:
    if result < 0:
        raise Failed(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3])
    check(f"mount {kind or source} on {target}", result)


def set_mount(path: str, flags: int, add: int, remove: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(add, remove, 0, 0)
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(path), flags, ctypes.byref(attributes), 32)
    check(f"change mount {path}", result)


def separate(writable: list[str], devices: list[str], uid: int) -> None:
    """Own mount, IPC and UTS namespaces: everything read-only but ``writable``, and only ``devices`` in /dev."""
    check("unshare", libc.unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS))
    # "Slave": what the host unmounts later goes away here too, so that no VM pins a disk of the host.
    mount("none", "/", None, MS_REC | MS_SLAVE)
    facts = [(path, os.stat(path)) for path in devices]  # noqa: PTH116 - pathlib costs 5 ms of import
    for path in writable:
        mount(path, path, None, MS_BIND)
    set_mount("/", AT_RECURSIVE, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0)
    for path in writable:
        set_mount(path, 0, 0, MOUNT_ATTR_RDONLY)
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755,size=64k")
    for path, was in facts:
        os.mknod(path, was.st_mode, was.st_rdev)
        os.chown(path, uid, uid)
        os.chmod(path, 0o600)  # noqa: PTH101
    set_mount("/dev", 0, MOUNT_ATTR_RDONLY, 0)


def join(file: str) -> None:
    """Enter a control group: what comes after us stays in it."""
    try:
        with open(file, "w") as group:  # noqa: PTH123
            group.write(str(os.getpid()))
    except OSError as error:
        raise Failed(f"enter {file}: {error.strerror}") from error


def own_process(report: int, namespace: int) -> None:
    """Go on as a new process, a child of our parent, in a session of its own; this process tells its pid and ends.

    Only a new process can be the first of a pid namespace. CLONE_PARENT keeps the daemon the parent: it can wait for
    QEMU, and no process stays between the two.
    """
    number = SYS_CLONE[os.uname().machine]
    pid = check("clone", libc.syscall(number, CLONE_PARENT | namespace | signal.SIGCHLD, 0, 0, 0, 0))
    if pid:
        os.write(report, b"%d\n" % pid)
        os._exit(0)
    os.setsid()


def become(uid: int, groups: list[int]) -> None:
    """Drop to ``uid`` with no capability left and none to be had again."""
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(
            PR_CAPBSET_DROP, capability, 0, 0, 0
        )  # one that this kernel does not know is EINVAL: nothing to drop
    os.setgroups(groups)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def spare_files() -> None:
    """From now on ``fallocate(FALLOC_FL_PUNCH_HOLE)`` succeeds and does nothing.

    When a guest gives memory back (balloon, free page reporting), QEMU punches a hole into the file behind it and then
    drops its own pages. A fork's file is its template's, whose seal refuses that, and QEMU would stop there. So it goes
    on, and gives back what is its own.
    """
    arch, number = FALLOCATE[os.uname().machine]
    program = [
        (BPF_LOAD, 0, 0, 4),  # architecture
        (BPF_EQUAL, 0, 5, arch),
        (BPF_LOAD, 0, 0, 0),  # number of the call
        (BPF_EQUAL, 0, 3, number),
        (BPF_LOAD, 0, 0, 24),  # low half of its second argument: the mode
        (BPF_AND, 0, 0, FALLOC_FL_PUNCH_HOLE),
        (BPF_EQUAL, 1, 0, FALLOC_FL_PUNCH_HOLE),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ERRNO),  # errno 0: success
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    check("seccomp", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0))


def main() -> None:
    cut = sys.argv.index("--")
    options = [item.partition("=")[::2] for item in sys.argv[1:cut]]
    one = dict(options)
    uid = int(one["uid"]) if "uid" in one else None
    report = int(one["report"])
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the guest's memory
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    for name, value in options:
        if name == "join":  # before anything is allocated, so that all of it is charged there
            join(value)
    if "namespaces" in one and uid is not None:
        every: dict[str, list[str]] = {"writable": [], "device": []}
        for name, value in options:
            every.get(name, []).append(value)
        separate(every["writable"], every["device"], uid)
        own_process(report, CLONE_NEWPID)
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV)
    else:
        own_process(report, 0)
    if uid is not None:
        become(uid, [int(group) for group in one.get("groups", "").split(",") if group])
    if "mortal" in one:  # after the change of user, which would undo it
        check("parent death signal", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        watch = select.poll()
        watch.register(report, 0)
        if watch.poll(0):  # nobody reads our report any more: the parent died before it could be noticed
            raise Failed("the daemon is gone")
    check("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if "spare" in one:
        spare_files()
    os.close(report)
    # Python ignores SIGPIPE and that would be inherited; QEMU sets what it wants itself.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execv(sys.argv[cut + 1], sys.argv[cut + 1 :])


if __name__ == "__main__":
    try:
        main()
    except (Failed, OSError) as error:
        sys.stderr.write(f"corral-launch: {error}\n")
        sys.stderr.flush()
        os._exit(126)
