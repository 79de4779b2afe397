"""Templates and forks with real guests: who a fork is, what it shares, what survives a SIGKILL of the daemon."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.ears import Ears, shout
from tests.integration.platform import FORKS, Platform, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

WHO = """
cat /etc/machine-id; hostname; cat /etc/ssh/ssh_host_ed25519_key.pub; cat /sys/class/net/e*/address
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo
ip -4 -o addr show scope global | awk '{print $4}'
"""


@pytest.fixture(scope="module")
def micro() -> Iterator[Platform]:
    """A platform with a template of micro guests of 96 MiB."""
    with Platform() as one:
        one.up()
        one.run("image", "build", "micro", timeout=300)
        one.run("template", "create", "micro", "--name", "warm", "--memory", "96M", timeout=200)
        yield one


@pytest.fixture
def warm(micro: Platform) -> Iterator[Platform]:
    """The same, with nothing of the test before, whatever became of that."""
    yield micro
    if any((micro.state / "vms").glob("*")) or len([*(micro.state / "templates").glob("*/")]) > 1:
        micro.up()
        micro.run("delete", "--all", "--force", "--yes", check=False)
        others = {*micro.text("template", "list", "-o", "name").split()} - {"warm"}
        for name in others:
            micro.run("template", "delete", name, check=False)


@pytest.fixture
def ears() -> Iterator[Ears]:
    one = Ears()
    yield one
    one.close()


def who(platform: Platform, name: str) -> tuple[str, ...]:
    """Machine-id, host name, host key, MAC, fresh random numbers, address."""
    lines = platform.text("exec", name, "--", "sh", "-c", WHO).splitlines()
    assert len(lines) == 6, lines
    return tuple(lines)


def test_a_fork_is_somebody_of_its_own_and_reaches_out(warm: Platform) -> None:
    said = warm.text("launch", "micro", "--name", "own", "--memory", "96M", "--publish", "0:8080")
    assert "forked from warm" in said
    vm = warm.vm("own")
    assert vm["status"]["template"] == "warm"
    assert "forked from template warm" in warm.text("info", "own")
    machine_id, hostname, key, mac, _, address = who(warm, "own")
    assert machine_id == vm["meta"]["id"].replace("-", "")
    assert (hostname, mac, address) == ("own", vm["spec"]["nics"][0]["mac"], "10.0.2.15/24")
    assert key.startswith("ssh-ed25519 ")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://10.0.2.2:{server.server_port}/"
        warm.run("exec", "--timeout", "20s", "own", "--", "wget", "-q", "-O", "/dev/null", url)
    finally:
        server.shutdown()
        server.server_close()
    warm.run("delete", "own", "--force")


@pytest.mark.timeout(600)
def test_many_at_once_are_many_and_their_template_stays(warm: Platform) -> None:
    options = ["--count", str(FORKS), "--memory", "96M", "--timeout", "400s"]
    warm.run("launch", "micro", "--name", "many", *options, timeout=420)
    names = [f"many-{number + 1}" for number in range(FORKS)]
    assert {warm.vm(name)["status"]["template"] for name in names} == {"warm"}
    with ThreadPoolExecutor(2) as pool:
        people = list(pool.map(lambda name: who(warm, name), names))
    for what in range(5):  # all but the address, which is the same behind each one's own NAT
        assert len({person[what] for person in people}) == FORKS, [person[what] for person in people]
    refused = warm.run("template", "delete", "warm", check=False)
    assert refused.returncode == 4
    assert b"many-1" in refused.stderr
    warm.run("delete", *names, "--force", timeout=200)


def test_what_does_not_fit_boots_and_says_why(warm: Platform) -> None:
    warm.run("launch", "micro", "--name", "cold", "--memory", "96M", "--cold")
    warm.run("launch", "micro", "--name", "other", "--memory", "97M")
    assert "booted" in warm.text("info", "cold")
    assert "there is no template of micro with 1 CPU, 97M" in warm.text("info", "other")
    assert warm.text("exec", "cold", "--", "hostname") == "cold\n"
    warm.run("delete", "cold", "other", "--force")


def test_a_fork_is_stopped_and_started_as_any_other(warm: Platform) -> None:
    warm.run("launch", "micro", "--name", "again", "--memory", "96M")
    before = warm.text("exec", "again", "--", "cat", "/proc/sys/kernel/random/boot_id")
    warm.run("restart", "again")
    assert warm.text("exec", "again", "--", "cat", "/proc/sys/kernel/random/boot_id") != before
    assert warm.text("exec", "again", "--", "hostname") == "again\n"
    assert warm.vm("again")["status"]["template"] == ""
    warm.run("delete", "again", "--force")


def test_forks_of_a_running_vm_have_its_memory_and_it_goes_on(warm: Platform) -> None:
    warm.run("launch", "micro", "--name", "parent", "--memory", "96M")
    warm.run("exec", "parent", "--", "sh", "-c", "echo remembered > /dev/shm/note; (sleep 3000 &)")
    pid = warm.vm("parent")["status"]["pid"]
    before = who(warm, "parent")
    said = warm.text("vm", "fork", "parent", "--name", "child", "--count", "2")
    assert "parent stood still for" in said
    for name in ("child-1", "child-2"):
        assert warm.text("exec", name, "--", "cat", "/dev/shm/note") == "remembered\n"
        assert "sleep" in warm.text("exec", name, "--", "ps")
        assert "forked from VM parent" in warm.text("info", name)
    people = [before, who(warm, "child-1"), who(warm, "child-2")]
    for what in range(5):
        assert len({person[what] for person in people}) == 3, [person[what] for person in people]
    assert warm.vm("parent")["status"]["pid"] == pid
    assert who(warm, "parent")[:4] == before[:4]
    warm.run("vm", "fork", "child-1", "--name", "grandchild")
    assert warm.text("exec", "grandchild", "--", "cat", "/dev/shm/note") == "remembered\n"
    warm.run("delete", "parent", "child-1", "child-2", "grandchild", "--force")
    wait_until(lambda: warm.text("template", "list", "-o", "name") == "warm\n", 60, "the templates of forks to go")


@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="without root all VMs are one user, and who said what cannot be told")
def test_each_fork_of_one_that_talks_is_somebody_before_it_is_heard(warm: Platform, ears: Ears, tmp_path: Path) -> None:
    warm.run("launch", "micro", "--name", "talker", "--memory", "96M")
    warm.run("cp", str(shout(tmp_path)), "talker:/shout")
    talk = f"chmod +x /shout; setsid /shout {ears.port} >/dev/null 2>&1 </dev/null &"
    warm.run("exec", "talker", "--", "sh", "-c", talk)
    parent = warm.vm("talker")["status"]["pid"]
    user = os.stat(f"/proc/{parent}").st_uid
    wait_until(lambda: user in ears.heard, 20, "the parent to be heard")
    before = who(warm, "talker")

    said = warm.text("vm", "fork", "talker", "--name", "child", "--count", str(FORKS), "--timeout", "400s", timeout=420)  # fmt: skip
    assert re.search(r"talker stood still for \d+ ms", said)
    names = [f"child-{number + 1}" for number in range(FORKS)]
    children = {name: warm.vm(name) for name in names}
    users = {name: os.stat(f"/proc/{vm['status']['pid']}").st_uid for name, vm in children.items()}
    wait_until(lambda: set(users.values()) <= set(ears.heard), 60, "each fork to be heard")
    for name, vm in children.items():
        heard = ears.heard[users[name]]
        somebody = vm["meta"]["created"] + vm["status"]["details"]["start"]["timings"]["identity"]
        assert heard[0][0] > somebody, f"{name} was heard {somebody - heard[0][0]:.3f} s before it was somebody"
        assert heard[-1][1] == name

    with ThreadPoolExecutor(2) as pool:
        people = [before, *pool.map(lambda name: who(warm, name), names)]
    for what in range(5):  # all but the address, which is the same behind each one's own NAT
        assert len({person[what] for person in people}) == FORKS + 1, [person[what] for person in people]
    assert warm.vm("talker")["status"]["pid"] == parent
    assert who(warm, "talker")[:4] == before[:4]
    numbers = [number for _, _, number in ears.heard[user]]
    assert numbers == sorted(set(numbers)), "the parent said everything once, in order"
    assert {name for _, name, _ in ears.heard[user]} == {"talker"}
    last = numbers[-1]
    wait_until(lambda: ears.heard[user][-1][2] > last, 20, "the parent to go on")
    warm.run("delete", "talker", *names, "--force", timeout=300)
    wait_until(lambda: warm.text("template", "list", "-o", "name") == "warm\n", 60, "the template of forks to go")


@pytest.mark.parametrize("point", ["template.spawned", "engine.freeze.recorded"])
def test_killed_while_a_template_is_made_it_is_still_made(warm: Platform, point: str) -> None:
    warm.run("down")
    warm.up(CORRAL_KILL_AT=point)
    warm.killed_at(point, "template", "create", "micro", "--name", "second", "--memory", "98M", "--no-wait", within=90)
    warm.up()
    wait_until(lambda: warm.json("template", "show", "second")["status"]["phase"] == "ready", 120, "the template", 0.5)
    assert warm.qemus() == []
    assert list((warm.state / "vms").glob("*")) == []
    warm.run("launch", "micro", "--name", "heir", "--memory", "98M")
    assert warm.vm("heir")["status"]["template"] == "second"
    warm.run("delete", "heir", "--force")
    warm.run("template", "delete", "second")
    wait_until(lambda: warm.text("template", "list", "-o", "name") == "warm\n", 30, "the template to be gone")


@pytest.mark.parametrize("point", ["start.resumed", "fork.identified"])
def test_killed_while_a_vm_is_forked_it_comes_up_as_itself(warm: Platform, point: str) -> None:
    warm.run("down")
    warm.up(CORRAL_KILL_AT=point)
    warm.killed_at(point, "launch", "micro", "--name", "victim", "--memory", "96M", "--no-wait")
    warm.up()
    warm.run("vm", "wait", "victim", "--for", "running", "--timeout", "60s")
    assert len(warm.qemus()) == 1
    assert warm.vm("victim")["status"]["template"] == "warm"
    assert who(warm, "victim")[1] == "victim"
    warm.run("delete", "victim", "--force")
    warm.assert_nothing_left()


def test_the_first_launch_that_boots_makes_a_template_for_the_next(warm: Platform) -> None:
    warm.run("down")
    warm.up(CORRAL_TEMPLATES="on")
    warm.run("launch", "micro", "--name", "first", "--memory", "100M")

    def made() -> bool:
        return any(one["spec"]["auto"] and one["status"]["phase"] == "ready" for one in warm.json("template", "list"))

    wait_until(made, 120, "a template of the platform's own", 0.5)
    warm.run("launch", "micro", "--name", "next", "--memory", "100M")
    assert warm.vm("next")["status"]["template"] == "micro-1x100m"
    warm.run("delete", "first", "next", "--force")
    warm.run("template", "prune")
    left = json.loads(warm.text("template", "list", "-o", "json"))
    wait_until(lambda: warm.text("template", "list", "-o", "name") == "warm\n", 30, f"{left} to be pruned")
