"""What `corral run --mount` carries back from a guest, and what it never does. Without guests."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from corral.cli.mount import Traces, bounded, carry, parse_mount, traces
from corral.errors import Invalid, Refused


class Case:
    """A directory here, what it was when the guest got it, and the guest's tree."""

    def __init__(self, top: Path) -> None:
        self.host, self.tree, self.outside = top / "host", top / "tree", top / "outside"
        for path in (self.host, self.outside):
            path.mkdir()
        (self.host / "same").write_text("same")
        (self.host / "old").write_text("old")
        (self.host / "deep").mkdir()
        (self.host / "deep" / "leaf").write_text("leaf")
        (self.host / "link").symlink_to("same")
        (self.host / "away").symlink_to(self.outside)
        (self.outside / "secret").write_text("secret")
        self.then: Traces = traces(self.host)
        os.system(f"cp -a {self.host} {self.tree}")
        self.complaints: dict[str, str] = {}

    def carry(self, **refused: str) -> None:
        carry(self.tree, self.host, self.then, refused, self.complaints.__setitem__)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_what_the_guest_changed_added_and_removed_is_carried_over(case: Case) -> None:
    (case.tree / "old").write_text("new")
    (case.tree / "fresh").mkdir()
    (case.tree / "fresh" / "one").write_text("1")
    (case.tree / "fresh" / "one").chmod(0o750)
    (case.tree / "deep" / "leaf").unlink()
    (case.tree / "deep").rmdir()
    (case.tree / "link").unlink()
    (case.tree / "link").symlink_to("old")
    before = (case.host / "same").stat()
    case.carry()
    assert case.complaints == {}
    assert (case.host / "old").read_text() == "new"
    assert (case.host / "fresh" / "one").stat().st_mode & 0o777 == 0o750
    assert not (case.host / "deep").exists()
    assert os.readlink(case.host / "link") == "old"
    assert (case.host / "same").stat().st_mtime_ns == before.st_mtime_ns
    assert (case.host / "same").stat().st_ino == before.st_ino
    assert sorted(os.listdir(case.host)) == ["away", "fresh", "link", "old", "same"]


def test_a_kind_that_changed_is_carried_over(case: Case) -> None:
    (case.tree / "old").unlink()
    (case.tree / "old").mkdir()
    (case.tree / "old" / "in").write_text("in")
    (case.tree / "deep" / "leaf").unlink()
    (case.tree / "deep").rmdir()
    (case.tree / "deep").write_text("flat")
    case.carry()
    assert (case.host / "old" / "in").read_text() == "in"
    assert (case.host / "deep").read_text() == "flat"


def test_what_was_changed_here_meanwhile_stays_and_is_told(case: Case) -> None:
    (case.host / "old").write_text("mine")
    (case.host / "deep" / "leaf").write_text("mine too")
    (case.host / "deep" / "more").write_text("mine as well")
    (case.tree / "old").write_text("guest's")
    (case.tree / "deep" / "leaf").unlink()
    (case.tree / "deep").rmdir()
    case.carry()
    assert (case.host / "old").read_text() == "mine"
    assert (case.host / "deep" / "leaf").read_text() == "mine too"
    assert set(case.complaints) == {"old", "deep/leaf", "deep"}


def test_nothing_is_written_or_removed_through_a_link(case: Case) -> None:
    (case.tree / "away").unlink()
    (case.tree / "away").mkdir()
    (case.tree / "away" / "secret").write_text("overwritten")
    case.carry()
    assert (case.outside / "secret").read_text() == "secret"
    assert not (case.host / "away").is_symlink()
    assert (case.host / "away" / "secret").read_text() == "overwritten"


def test_a_link_made_here_meanwhile_is_not_followed(case: Case) -> None:
    (case.host / "deep" / "leaf").unlink()
    (case.host / "deep").rmdir()
    (case.host / "deep").symlink_to(case.outside)
    (case.tree / "deep" / "secret").write_text("overwritten")
    case.carry()
    assert (case.outside / "secret").read_text() == "secret"
    assert "deep/secret" in case.complaints


def test_what_could_not_be_taken_out_is_not_taken_for_removed(case: Case) -> None:
    (case.tree / "away").unlink()
    (case.tree / "old").unlink()
    carry(case.tree, case.host, case.then, {"away": "it leads out", "old": "a device", "new": "a device"},
          case.complaints.__setitem__)  # fmt: skip
    assert (case.host / "away").is_symlink()
    assert (case.host / "old").read_text() == "old"
    assert case.complaints == {"new": "a device"}


@pytest.mark.parametrize(
    ("word", "guest", "readonly"),
    [
        ("{}", "/mnt/dir", False), ("{}:ro", "/mnt/dir", True), ("{}:/src", "/src", False),
        ("{}:/src/:ro", "/src", True), ("{}:rw", "/mnt/dir", False), ("{}/.", "/mnt/dir", False),
    ],
)  # fmt: skip
def test_words_of_mounts(tmp_path: Path, word: str, guest: str, readonly: bool) -> None:
    (tmp_path / "dir").mkdir()
    found = parse_mount(word.format(tmp_path / "dir"))
    assert (found.host, found.guest, found.readonly) == (tmp_path / "dir", guest, readonly)


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid):
        parse_mount(f"{tmp_path}/nothing")
    with pytest.raises(click.BadParameter):
        parse_mount(f"{tmp_path}:/")
    with pytest.raises(click.BadParameter):
        parse_mount(f"{tmp_path}:/a/../..")


def test_what_comes_back_is_bounded() -> None:
    count = bounded(10)
    count(10)
    with pytest.raises(Refused) as caught:
        count(1)
    assert caught.value.code == "too-large"
