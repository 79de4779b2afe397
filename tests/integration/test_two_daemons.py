"""Two state directories never meet, as root and as a plain user; a second daemon on one directory is refused."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import sys
from pathlib import Path

import pytest

from tests.integration.platform import CACHE, CORRAL, Platform

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]


def test_two_daemons_run_side_by_side() -> None:
    with Platform() as one, Platform() as two:
        for platform in (one, two):
            platform.up()
            platform.run("image", "build", "micro", timeout=300)
            platform.run("launch", "micro", "--name", "same", "--memory", "96M")
        assert one.vm("same")["meta"]["id"] != two.vm("same")["meta"]["id"]
        one.run("delete", "same", "--force")
        assert one.json("list") == []
        assert two.text("exec", "same", "--", "echo", "here") == "here\n"


def test_a_second_daemon_on_the_same_directory_is_refused(platform: Platform) -> None:
    second = platform.run("up", "--foreground", check=False, timeout=30)
    assert second.returncode == 4
    assert str(platform.pid()) in second.stderr.decode()


def test_it_works_in_a_very_deep_directory() -> None:
    deep = Path("/tmp") / f"corral-deep-{os.getpid()}" / ("d" * 100) / ("e" * 60)
    deep.mkdir(parents=True)
    try:
        with Platform(parent=deep) as one:
            one.up()
            one.run("image", "build", "micro", timeout=300)
            one.run("launch", "micro", "--name", "deep", "--memory", "96M")
            assert one.text("exec", "deep", "--", "echo", "here") == "here\n"
    finally:
        shutil.rmtree(deep.parents[1])


@pytest.mark.skipif(
    os.getuid() != 0, reason="becoming a plain user takes root; as a plain user every other test shows it"
)
def test_it_works_as_a_plain_user(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same clone, run by ``nobody``: no privileges, QEMU as that user."""
    nobody = pwd.getpwnam("nobody")
    programs = (CORRAL, Path(sys.executable).resolve())
    readable = all(place.stat().st_mode & 0o001 for program in programs for place in program.parents)
    with Platform(prefix=["setpriv", "--reuid=nobody", f"--regid={nobody.pw_gid}", "--clear-groups"]) as plain:
        os.chown(plain.state, nobody.pw_uid, nobody.pw_gid)
        plain.env |= {"HOME": str(plain.state), "XDG_DATA_HOME": str(plain.state)}
        if not readable:
            plain.prefix = ["setpriv", "--reuid=nobody", f"--regid={nobody.pw_gid}", "--clear-groups",
                            "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # fmt: skip
        own_cache = plain.state / "cache"
        for manifest in (CACHE / "images").glob("*/manifest.json"):
            if json.loads(manifest.read_text())["name"] == "micro":
                shutil.copytree(manifest.parent, own_cache / "images" / manifest.parent.name, symlinks=True)
        for path in [own_cache, *own_cache.rglob("*")]:
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        plain.env["CORRAL_CACHE"] = str(own_cache)
        plain.up()
        plain.run("image", "build", "micro", timeout=300)
        plain.run("launch", "micro", "--name", "mine", "--memory", "96M")
        platform.run("launch", "micro", "--name", "roots", "--memory", "96M")
        assert plain.text("exec", "mine", "--", "echo", "unprivileged") == "unprivileged\n"
        assert [vm["meta"]["name"] for vm in plain.json("list")] == ["mine"]
        assert [vm["meta"]["name"] for vm in platform.json("list")] == ["roots"]
        (qemu,) = plain.qemus()
        assert Path(f"/proc/{qemu}").stat().st_uid == nobody.pw_uid
        (roots,) = platform.qemus()
        assert Path(f"/proc/{roots}").stat().st_uid not in (0, nobody.pw_uid)
