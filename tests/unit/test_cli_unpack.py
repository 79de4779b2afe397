"""`corral cp`: what a hostile guest sends never lands outside the target; what a person sends arrives as it was."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from corral.client.sync.pack import check_source, pack
from corral.client.sync.unpack import MAX_HEADER, take_file, unpack
from corral.errors import CorralError, Invalid


def entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "", mode: int = 0o644) -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(data), mode
    return info, data


def stream(*entries: tuple) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "victim").write_text("mine")
    return tmp_path / "work" / "target"


def taken(place: Path, *entries: tuple) -> tuple[int, dict[str, str]]:
    refused: dict[str, str] = {}
    count = unpack(stream(*entries), place, refused=refused.__setitem__, progress=lambda _: None)
    return count, refused


TOP = entry("top", tarfile.DIRTYPE, mode=0o755)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (entry("top/../../victim", data=b"gone"), ".."),
        (entry("../victim", data=b"gone"), ".."),
        (entry("/etc/cron.d/evil", data=b"gone"), "absolute"),
        (entry("top/null", tarfile.CHRTYPE), "device"),
        (entry("top/disk", tarfile.BLKTYPE), "device"),
        (entry("top/pipe", tarfile.FIFOTYPE), "FIFO"),
        (entry("top/out", tarfile.SYMTYPE, link="/etc/passwd"), "leads out"),
        (entry("top/out", tarfile.SYMTYPE, link="../../victim"), "leads out"),
        (entry("top/a/out", tarfile.SYMTYPE, link="../../.."), "leads out"),
    ],
)
def test_what_leads_out_is_refused_by_name_and_the_rest_is_taken(place: Path, bad: tuple, why: str) -> None:
    count, refused = taken(place, TOP, bad, entry("top/good", data=b"kept"))
    assert count == 2
    (reason,) = refused.values()
    assert why in reason
    assert (place / "good").read_bytes() == b"kept"
    assert (place.parent.parent / "victim").read_text() == "mine"
    assert sorted(os.listdir(place)) in (["good"], ["a", "good"])


def test_nothing_is_written_through_a_link_even_one_that_stays_inside(place: Path) -> None:
    """A link to a shallower directory turns a harmless ``../..`` below it into a way out."""
    count, refused = taken(
        place,
        TOP,
        entry("top/d", tarfile.DIRTYPE, mode=0o755),
        entry("top/d/up", tarfile.SYMTYPE, link=".."),
        entry("top/d/up/out", tarfile.SYMTYPE, link="../../victim"),
        entry("top/d/up/file", data=b"x"),
    )
    assert count == 3
    assert set(refused) == {"top/d/up/out", "top/d/up/file"}
    assert sorted(os.listdir(place)) == ["d"]


def test_a_link_that_stands_where_a_file_goes_is_replaced_not_followed(place: Path) -> None:
    place.mkdir()
    (place / "f").symlink_to(place.parent.parent / "victim")
    taken(place, TOP, entry("top/f", data=b"new"))
    assert (place / "f").read_bytes() == b"new"
    assert not (place / "f").is_symlink()
    assert (place.parent.parent / "victim").read_text() == "mine"


def test_a_hard_link_cannot_take_in_a_file_of_this_machine(place: Path) -> None:
    place.mkdir()
    (place / "l").symlink_to(place.parent.parent / "victim")
    count, refused = taken(place, TOP, entry("top/h", tarfile.LNKTYPE, link="top/l"))
    assert count == 1
    assert "no file" in refused["top/h"]


def test_set_id_bits_do_not_arrive(place: Path) -> None:
    taken(place, TOP, entry("top/su", data=b"#!", mode=0o6755))
    assert (place / "su").stat().st_mode & 0o7777 == 0o755


def test_a_header_that_claims_to_be_huge_is_not_read_into_memory(place: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, MAX_HEADER + 1
    endless = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
    with pytest.raises(CorralError, match="not a tar stream"):
        unpack(endless, place, refused=lambda *_: None, progress=lambda _: None)


@pytest.mark.parametrize("data", [b"", b"garbage", b"x" * 10_000])
def test_garbage_is_an_error_in_words(place: Path, data: bytes) -> None:
    with pytest.raises(CorralError) as caught:
        unpack(io.BytesIO(data), place, refused=lambda *_: None, progress=lambda _: None)
    assert caught.value.code == "guest"


def test_a_stream_that_ends_in_the_middle_is_an_error(place: Path) -> None:
    whole = stream(TOP, entry("top/big", data=b"x" * 50_000)).getvalue()
    with pytest.raises(CorralError):
        unpack(io.BytesIO(whole[:20_000]), place, refused=lambda *_: None, progress=lambda _: None)


def test_one_file_goes_to_the_path_that_was_given(tmp_path: Path) -> None:
    take_file(stream(entry("./run", data=b"#!/bin/sh", mode=0o755)), tmp_path / "here", progress=lambda _: None)
    assert (tmp_path / "here").read_bytes() == b"#!/bin/sh"
    assert (tmp_path / "here").stat().st_mode & 0o777 == 0o755
    with pytest.raises(CorralError, match="something else"):
        take_file(stream(TOP), tmp_path / "there", progress=lambda _: None)


def test_a_tree_packed_and_unpacked_is_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / ("x" * 120)).mkdir(parents=True)
    (source / "deep" / ("x" * 120) / "bytes").write_bytes(os.urandom(300_000))
    (source / "umlaut ä and space").write_text("text")
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o750)
    (source / "link").symlink_to("run.sh")
    os.mkfifo(source / "pipe")
    buffer, skipped, seen = io.BytesIO(), [], []
    pack(source, "top", buffer, skipped=lambda path, _: skipped.append(path), progress=seen.append)
    buffer.seek(0)
    unpack(buffer, tmp_path / "copy", refused=lambda *_: pytest.fail("refused"), progress=lambda _: None)
    assert skipped == [str(source / "pipe")]
    assert sum(seen) == 300_000 + 4 + 10
    name = Path("deep") / ("x" * 120) / "bytes"
    assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "copy" / "run.sh").stat().st_mode & 0o777 == 0o750
    assert os.readlink(tmp_path / "copy" / "link") == "run.sh"
    assert (tmp_path / "copy" / "umlaut ä and space").read_text() == "text"


def test_sources_that_cannot_be_copied_are_refused_before_anything_starts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "missing", tmp_path):
        with pytest.raises(Invalid):
            check_source(bad, recursive=False)
    check_source(tmp_path, recursive=True)
