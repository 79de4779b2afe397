"""Downloads from servers that break off, lie, never end or lead elsewhere."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from corral.errors import CorralError, NotFound, Refused, Unavailable
from corral.images.catalogue import catalogue, checksum_in, find
from corral.images.fetch import ATTEMPTS, Checksum, Fetcher
from corral.images.http import Http, is_public
from corral.runtime import Random, Runtime, SystemRandom
from tests.unit.web_server import Asked, head, serving

CONTENT = bytes(range(256)) * 2000
SHA256 = Checksum.parse("sha256:" + hashlib.sha256(CONTENT).hexdigest())
SHA512 = Checksum.parse("SHA512:" + hashlib.sha512(CONTENT).hexdigest())


class Quick:
    """Time that does not pass while one waits: retries follow at once."""

    def now(self) -> float:
        return 0.0

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def fetcher(directory: Path, **options: int) -> Fetcher:
    random: Random = SystemRandom()
    return Fetcher(directory, Runtime(clock=Quick(), random=random), allow_loopback=True, **options)


def ignore(step: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


async def whole(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(head(200, Content_Length=len(CONTENT), ETag='"v1"') + CONTENT)


async def resumable(asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Sends a third of the file at a time, then breaks off."""
    start, third = asked.start, len(CONTENT) // 3 + 1
    status = 206 if start else 200
    extent = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
    writer.write(head(status, Content_Length=len(CONTENT) - start, ETag='"v1"', **extent))
    writer.write(CONTENT[start : start + third])


async def test_a_file_arrives_and_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    async with serving(whole) as web:
        part = await fetcher(tmp_path).fetch(web.url(), SHA512, lambda *step: told.append(step))
    assert part.read_bytes() == CONTENT
    assert told[0] == ("downloading", 0, len(CONTENT))
    assert ("downloading", len(CONTENT), len(CONTENT)) in told
    assert told[-1][0] == "checking the checksum"


async def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    async with serving(resumable) as web:
        part = await fetcher(tmp_path).fetch(web.url(), SHA256, ignore)
        starts = [asked.start for asked in web.asked]
    assert part.read_bytes() == CONTENT
    assert len(starts) == 3
    assert starts == sorted(set(starts))
    assert web.asked[1].headers["if-range"] == '"v1"'


async def test_a_killed_download_goes_on_in_the_next_process(tmp_path: Path) -> None:
    arrived = asyncio.Event()

    async def stalls(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, Content_Length=len(CONTENT), ETag='"v1"') + CONTENT[:100_000])
        await writer.drain()
        await arrived.wait()

    async with serving(stalls) as web:
        first = asyncio.create_task(fetcher(tmp_path).fetch(web.url(), SHA256, ignore))
        while not any(path.stat().st_size for path in tmp_path.glob("*.part")):
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        arrived.set()
        web.answer = resumable
        part = await fetcher(tmp_path).fetch(web.url(), SHA256, ignore)
    assert part.read_bytes() == CONTENT
    assert web.asked[1].start > 0


async def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path: Path) -> None:
    async def changed(asked: Asked, writer: asyncio.StreamWriter) -> None:
        old = not asked.start
        if old:
            writer.write(head(200, Content_Length=len(CONTENT), ETag='"old"') + b"x" * 1000)
        else:
            await whole(asked, writer)  # If-Range does not match: the whole file comes

    async with serving(changed) as web:
        part = await fetcher(tmp_path).fetch(web.url(), SHA256, ignore)
    assert part.read_bytes() == CONTENT


async def test_another_range_than_asked_for_is_not_taken(tmp_path: Path) -> None:
    async def elsewhere(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if not asked.start:
            writer.write(head(200, Content_Length=len(CONTENT), ETag='"v1"') + CONTENT[:1000])
        else:
            writer.write(head(206, Content_Length=10, Content_Range=f"bytes 5-14/{len(CONTENT)}") + CONTENT[5:15])

    async with serving(elsewhere) as web:
        with pytest.raises(Unavailable, match="another part"):
            await fetcher(tmp_path).fetch(web.url(), SHA256, ignore)


async def test_a_truncated_file_is_given_up_after_some_attempts_and_kept(tmp_path: Path) -> None:
    async def short(asked: Asked, writer: asyncio.StreamWriter) -> None:
        start = asked.start
        extent = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
        writer.write(head(206 if start else 200, Content_Length=len(CONTENT) - start, ETag='"v1"', **extent))
        writer.write(CONTENT[start:5000])

    async with serving(short) as web:
        with pytest.raises(Unavailable, match="broke off"):
            await fetcher(tmp_path).fetch(web.url(), SHA256, ignore)
    assert len(web.asked) == ATTEMPTS + 1
    assert [path.stat().st_size for path in tmp_path.glob("*.part")] == [5000]


@pytest.mark.parametrize("length", ["huge", "none"])
async def test_a_file_without_end_is_cut_off(tmp_path: Path, length: str) -> None:
    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, **({"Content_Length": 10**15} if length == "huge" else {})))
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    async with serving(endless) as web:
        with pytest.raises(Refused, match=r"at most|larger than") as caught:
            await fetcher(tmp_path, max_bytes=1 << 20).fetch(web.url(), SHA256, ignore)
    assert caught.value.code == "too-large"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1 << 20


async def test_a_wrong_checksum_is_refused_and_thrown_away(tmp_path: Path) -> None:
    async with serving(whole) as web:
        with pytest.raises(Refused, match="checksum") as caught:
            await fetcher(tmp_path).fetch(web.url(), Checksum("sha256", "0" * 64), ignore)
    assert caught.value.code == "bad-image"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "kind"), [(404, Refused), (403, Refused), (500, Unavailable), (204, Unavailable)])
async def test_what_a_status_means(tmp_path: Path, status: int, kind: type[CorralError]) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(status, Content_Length=0))

    async with serving(answer) as web:
        with pytest.raises(kind, match=str(status)):
            await fetcher(tmp_path).fetch(web.url(), SHA256, ignore)


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/", "https://10.0.0.1/disk.img", "https://[::ffff:192.168.1.1]/x",
        "https://[fd00::1]/x", "http://8.8.8.8/plain-http", "file:///etc/passwd", "ftp://example.com/x", "gopher://x/",
    ],
)  # fmt: skip
async def test_a_redirect_to_where_nobody_should_look_is_refused(tmp_path: Path, target: str) -> None:
    async def redirect(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(302, Location=target, Content_Length=0))

    async with serving(redirect) as web:
        with pytest.raises(Refused) as caught:
            await fetcher(tmp_path).fetch(web.url(), SHA256, ignore)
    assert caught.value.code == "denied"
    assert not list(tmp_path.glob("*.part"))


async def test_redirects_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    async def around(asked: Asked, writer: asyncio.StreamWriter) -> None:
        number = int(asked.path.removeprefix("/"))
        if number == 3:
            await whole(asked, writer)
        else:
            writer.write(head(307, Location=f"/{number + 1}", Content_Length=0))

    async with serving(around) as web:
        assert (await fetcher(tmp_path).fetch(web.url("/0"), SHA256, ignore)).read_bytes() == CONTENT
        with pytest.raises(Refused, match="redirects"):
            await fetcher(tmp_path).fetch(web.url("/4"), SHA256, ignore)


async def test_this_machine_is_not_asked_without_permission(tmp_path: Path) -> None:
    async with serving(whole) as web:
        for url in (web.url(), web.url().replace("127.0.0.1", "localhost"), web.url().replace("http:", "https:")):
            with pytest.raises(Refused) as caught:
                await Fetcher(tmp_path, Runtime()).fetch(url, SHA256, ignore)
            assert caught.value.code == "denied"
        assert web.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "disk.img",
        "https://",
        "http://example.com/x",
        "https://user:pw@example.com/x",
        "https://a\nb/",
        "https://[::1",
    ],
)
async def test_what_is_not_a_public_https_url_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(CorralError):
        async with Http().get(url):
            pass


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True), ("2606:4700:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
        ("fe80::1", False), ("fd00::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False),
        ("::ffff:1.1.1.1", True), ("64:ff9b::10.0.0.1", False), ("2002:7f00:1::", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    "text", ["", "sha256", "sha256:abc", "md5:" + "0" * 32, "sha256:" + "g" * 64, "sha512:" + "0" * 64]
)
def test_checksums_that_are_none(text: str) -> None:
    with pytest.raises(Refused):
        Checksum.parse(text)


def test_every_entry_of_the_catalogue_is_complete() -> None:
    names = {listed.name for listed in catalogue()}
    assert {"debian-12", "debian-13", "ubuntu-22.04", "ubuntu-24.04", "rocky-9", "alma-9", "arch"} <= names
    for listed in catalogue():
        for url in (listed.url, listed.checksums):
            assert url.startswith("https://")
            assert "{" not in url
        assert listed.arch in ("x86_64", "aarch64", "riscv64")
    with pytest.raises(NotFound):
        find("windows-95", "x86_64")
    with pytest.raises(Refused, match="does not come"):
        find("arch", "riscv64")


@pytest.mark.parametrize(
    "text",
    [
        f"{'a' * 64}  other.img\n{'b' * 64}  disk.img\n",
        f"{'b' * 64} *disk.img\n",
        f"# disk.img: 123 bytes\nSHA256 (disk.img) = {'b' * 64}\n",
        f"{'B' * 64}\n",
        f"-----BEGIN PGP SIGNED MESSAGE-----\n\nSHA256 (disk.img) = {'b' * 64}\n-----BEGIN PGP SIGNATURE-----\n",
    ],
)
def test_checksum_lists_in_all_their_forms(text: str) -> None:
    assert checksum_in(text, "disk.img", "sha256") == "sha256:" + "b" * 64


@pytest.mark.parametrize(
    "text", ["", f"{'b' * 64}  disk.img.asc\n", f"{'b' * 64}  notdisk.img\n", f"{'b' * 128}  disk.img\n"]
)
def test_a_checksum_of_another_file_is_not_taken(text: str) -> None:
    with pytest.raises(NotFound):
        checksum_in(text, "disk.img", "sha256")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Key and self-signed certificate for the name localhost, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    argv += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(argv, check=True, capture_output=True)
    pem.write_text(pem.read_text() + key.read_text())
    return pem


async def test_tls_verifies_the_name_although_the_address_is_pinned(
    tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with serving(whole, tls=context) as web:
        url = web.url().replace("http://127.0.0.1", "https://localhost")
        assert (await fetcher(tmp_path).fetch(url, SHA256, ignore)).read_bytes() == CONTENT
        assert web.asked[0].headers["host"] == f"localhost:{web.port}"
        with pytest.raises(Unavailable, match="certificate"):
            async with Http(allow_loopback=True).get(url.replace("localhost", "127.0.0.1")):
                pass
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(Unavailable, match="certificate"):
            async with Http(allow_loopback=True).get(url):
                pass
