"""Downloads against a server on 127.0.0.1 that drops connections, ignores ranges and changes its files."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from jasper_asr.data.download import (
    NVIDIA_CHECKPOINT_PAGE,
    download,
    download_checkpoint,
    extract_tar,
)
from jasper_asr.errors import DownloadError, StorageError, UsageError

BODY = np.random.default_rng(7).bytes(3_000_000)
MD5 = hashlib.md5(BODY).hexdigest()
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclass
class Site:
    """What the server serves, how it misbehaves, and what it was asked."""

    port: int = 0
    body: bytes = BODY
    etag: str | None = '"v1"'
    last_modified: str | None = None
    ranges: bool = True  # False: answers 200 with everything
    send_length: bool = True
    drops: list[int] = field(default_factory=list)  # bytes sent before the connection is cut, per request
    statuses: list[int] = field(default_factory=list)  # answered instead of the file, per request
    after_request: object = None  # called with the number of requests so far
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, Range, If-Range
    sent: list[tuple[int, int]] = field(default_factory=list)  # status, body bytes sent

    def url(self, path="/data.bin"):
        return f"http://127.0.0.1:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        site = self.server.site
        wanted = self.headers["Range"]
        site.asked.append((self.path, wanted, self.headers["If-Range"]))
        if self.path.startswith("/to/"):
            return self.redirect(self.path.removeprefix("/to/"))
        if self.path == "/loop":
            return self.redirect("/loop")
        if site.statuses:
            status = site.statuses.pop(0)
            return self.send_error(status) if status else None  # None: closes without a word
        start = self.first_byte(site, wanted)
        if start >= len(site.body) > 0 and start > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(site.body)}")
            self.end_headers()
            site.sent.append((416, 0))
            return None
        rest = site.body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(site.body) - 1}/{len(site.body)}")
        if site.send_length:
            self.send_header("Content-Length", str(len(rest)))
        if site.etag:
            self.send_header("ETag", site.etag)
        if site.last_modified:
            self.send_header("Last-Modified", site.last_modified)
        self.end_headers()
        rest = rest[: site.drops.pop(0)] if site.drops else rest
        site.sent.append((206 if start else 200, len(rest)))
        with contextlib.suppress(OSError):
            self.wfile.write(rest)
        if site.after_request:
            site.after_request(len(site.asked))
        return None

    def first_byte(self, site, wanted):
        if not wanted or not site.ranges:
            return 0
        condition = self.headers["If-Range"]
        if condition is not None and condition not in (site.etag, site.last_modified):
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))

    def redirect(self, target):
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.site = Site(port=server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.site
    server.shutdown()
    thread.join()
    server.server_close()


class Naps(list):
    """Stands for time.sleep and remembers how long it was asked to sleep."""

    def __call__(self, seconds):
        self.append(seconds)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# --- whole downloads --------------------------------------------------------------------------------------


def test_a_file_arrives_whole_with_its_hashes(site, tmp_path):
    seen = []
    result = download(site.url(), tmp_path / "new" / "x.bin", md5=MD5.upper(), progress=lambda *args: seen.append(args))
    assert (tmp_path / "new" / "x.bin").read_bytes() == BODY
    assert (result.path, result.bytes) == (tmp_path / "new" / "x.bin", len(BODY))
    assert (result.md5, result.sha256, result.verified) == (MD5, SHA256, True)
    assert names(tmp_path / "new") == ["x.bin"]
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_without_a_hash_the_result_is_not_verified(site, tmp_path):
    result = download(site.url(), tmp_path / "x.bin", size=len(BODY))
    assert (result.verified, result.sha256) == (False, SHA256)


def test_a_file_with_the_right_hash_is_kept_without_asking_the_server(site, tmp_path):
    (tmp_path / "x.bin").write_bytes(BODY)
    assert download(site.url(), tmp_path / "x.bin", sha256=SHA256).verified
    assert site.asked == []


def test_a_file_with_another_hash_is_replaced(site, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"old" * 1000)
    assert download(site.url(), tmp_path / "x.bin", sha256=SHA256, md5=MD5).verified
    assert (tmp_path / "x.bin").read_bytes() == BODY


def test_without_a_hash_an_existing_file_is_judged_by_its_size(site, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(len(BODY)))
    assert download(site.url(), path).md5 == hashlib.md5(bytes(len(BODY))).hexdigest()
    assert path.read_bytes() == bytes(len(BODY))
    path.write_bytes(bytes(len(BODY) - 1))
    assert download(site.url(), path).md5 == MD5
    assert path.read_bytes() == BODY
    assert names(tmp_path) == ["x.bin"]


def test_a_server_that_names_no_length(site, tmp_path):
    site.send_length = False
    seen = []
    download(site.url(), tmp_path / "x.bin", md5=MD5, progress=lambda *args: seen.append(args))
    assert (tmp_path / "x.bin").read_bytes() == BODY
    assert seen[-1] == (len(BODY), None)


def test_an_empty_file(site, tmp_path):
    site.body = b""
    assert download(site.url(), tmp_path / "x.bin").bytes == 0
    assert (tmp_path / "x.bin").read_bytes() == b""


# --- going on after a break -------------------------------------------------------------------------------


def test_dropped_connections_are_resumed_not_restarted(site, tmp_path):
    site.drops = [1_000_000, 500_000, 700]
    naps = Naps()
    assert download(site.url(), tmp_path / "x.bin", sha256=SHA256, sleep=naps).verified
    assert (tmp_path / "x.bin").read_bytes() == BODY
    assert site.asked == [
        ("/data.bin", None, None),
        ("/data.bin", "bytes=1000000-", '"v1"'),
        ("/data.bin", "bytes=1500000-", '"v1"'),
        ("/data.bin", "bytes=1500700-", '"v1"'),
    ]
    assert site.sent == [(200, 1_000_000), (206, 500_000), (206, 700), (206, 1_499_300)]
    assert naps == [0.5, 1.0, 2.0]
    assert names(tmp_path) == ["x.bin"]


def test_a_run_that_gave_up_is_gone_on_with_by_the_next(site, tmp_path):
    path = tmp_path / "x.bin"
    site.drops = [400_000, 0, 0]
    with pytest.raises(DownloadError) as error:
        download(site.url(), path, md5=MD5, retries=2, sleep=Naps())
    assert str(error.value) == (
        f"{path}: the connection closed at byte 400000 of 3000000, and 2 retries did not help; "
        "run it again later, the first 400000 bytes are kept"
    )
    assert len(site.asked) == 3
    assert not path.exists()
    assert (tmp_path / "x.bin.part").read_bytes() == BODY[:400_000]
    assert download(site.url(), path, md5=MD5).verified
    assert site.asked[3:] == [("/data.bin", "bytes=400000-", '"v1"')]
    assert site.sent[-1] == (206, len(BODY) - 400_000)


def test_retries_start_again_after_a_mebibyte(site, tmp_path):
    site.drops = [1 << 20, 1 << 20, 100]
    naps = Naps()
    download(site.url(), tmp_path / "x.bin", md5=MD5, retries=2, sleep=naps)
    assert naps == [0.5, 0.5, 1.0]
    (tmp_path / "x.bin").unlink()
    site.drops = [100, 100, 100]
    with pytest.raises(DownloadError, match="2 retries did not help"):
        download(site.url(), tmp_path / "x.bin", md5=MD5, retries=2, sleep=naps)


def test_a_server_that_ignores_ranges_is_read_from_the_start(site, tmp_path):
    site.ranges = False
    site.drops = [1_000_000]
    download(site.url(), tmp_path / "x.bin", md5=MD5, sleep=Naps())
    assert (tmp_path / "x.bin").read_bytes() == BODY
    assert [wanted for _, wanted, _ in site.asked] == [None, "bytes=1000000-"]
    assert site.sent == [(200, 1_000_000), (200, len(BODY))]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_any_strong_validator_nothing_is_resumed(site, tmp_path, etag):
    site.etag = etag
    site.drops = [1_000_000]
    download(site.url(), tmp_path / "x.bin", md5=MD5, sleep=Naps())
    assert [wanted for _, wanted, _ in site.asked] == [None, None]
    assert (tmp_path / "x.bin").read_bytes() == BODY


def test_the_date_of_the_last_change_serves_as_validator(site, tmp_path):
    site.etag, site.last_modified = 'W/"weak"', "Fri, 14 Aug 2015 10:00:00 GMT"
    site.drops = [1_000_000]
    download(site.url(), tmp_path / "x.bin", md5=MD5, sleep=Naps())
    assert site.asked[1] == ("/data.bin", "bytes=1000000-", "Fri, 14 Aug 2015 10:00:00 GMT")
    assert (tmp_path / "x.bin").read_bytes() == BODY


def test_a_file_that_changes_midway_is_fetched_anew(site, tmp_path):
    new = np.random.default_rng(8).bytes(2_000_000)

    def change(requests):
        if requests == 1:
            site.body, site.etag = new, '"v2"'

    site.drops, site.after_request = [1_000_000], change
    result = download(site.url(), tmp_path / "x.bin", sleep=Naps())
    assert (tmp_path / "x.bin").read_bytes() == new
    assert result.bytes == len(new)
    assert site.sent == [(200, 1_000_000), (200, 2_000_000)]


def test_a_range_of_another_version_is_not_glued_on(site, tmp_path, monkeypatch):
    """A server that heeds Range but not If-Range: its ETag tells."""
    new = np.random.default_rng(8).bytes(len(BODY))

    def change(requests):
        if requests == 1:
            site.body, site.etag = new, '"v2"'

    monkeypatch.setattr(
        Handler, "first_byte", lambda self, site, wanted: int(wanted[6:-1]) if wanted else 0, raising=True
    )
    site.drops, site.after_request = [1_000_000], change
    download(site.url(), tmp_path / "x.bin", sleep=Naps())
    assert (tmp_path / "x.bin").read_bytes() == new
    assert [wanted for _, wanted, _ in site.asked] == [None, "bytes=1000000-", None]


def test_a_part_that_was_whole_already_needs_no_byte_more(site, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(BODY)
    notes = {"url": site.url(), "validator": '"v1"', "size": len(BODY)}
    (tmp_path / "x.bin.part.json").write_text(json.dumps(notes))
    assert download(site.url(), tmp_path / "x.bin", md5=MD5).verified
    assert site.sent == [(416, 0)]
    assert names(tmp_path) == ["x.bin"]


def test_a_part_longer_than_the_file_is_thrown_away(site, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(BODY + b"more")
    (tmp_path / "x.bin.part.json").write_text(json.dumps({"url": site.url(), "validator": '"v1"'}))
    assert download(site.url(), tmp_path / "x.bin", md5=MD5, sleep=Naps()).verified
    assert [status for status, _ in site.sent] == [416, 200]


@pytest.mark.parametrize("notes", ["", "[1]", '{"url": "http://other/x", "validator": "\\"v1\\""}', "{}"])
def test_a_part_of_unknown_origin_is_thrown_away(site, tmp_path, notes):
    (tmp_path / "x.bin.part").write_bytes(b"?" * 1000)
    (tmp_path / "x.bin.part.json").write_text(notes)
    assert download(site.url(), tmp_path / "x.bin", md5=MD5).verified
    assert [wanted for _, wanted, _ in site.asked] == [None]


def test_server_errors_are_retried(site, tmp_path):
    site.statuses = [503, 500, 429, 0]
    naps = Naps()
    download(site.url(), tmp_path / "x.bin", md5=MD5, sleep=naps)
    assert naps == [0.5, 1.0, 2.0, 4.0]
    assert (tmp_path / "x.bin").read_bytes() == BODY


def test_silence_ends_an_attempt(site, tmp_path):
    """The first answer stops halfway without closing; the client must not wait for ever."""
    go = threading.Event()
    site.drops = [1000]
    site.after_request = lambda requests: go.wait(5) if requests == 1 else go.set()
    download(site.url(), tmp_path / "x.bin", md5=MD5, timeout=0.2, sleep=Naps())
    assert (tmp_path / "x.bin").read_bytes() == BODY
    assert site.asked[1][1] == "bytes=1000-"


# --- refusals ---------------------------------------------------------------------------------------------


def test_a_missing_file_is_not_retried(site, tmp_path):
    site.statuses = [404, 404]
    with pytest.raises(DownloadError) as error:
        download(site.url("/a.bin?token=secret"), tmp_path / "x.bin", sleep=Naps())
    assert str(error.value) == (
        f"{tmp_path / 'x.bin'}: HTTP 404 Not Found (http://127.0.0.1:{site.port}/a.bin); check the address"
    )
    assert len(site.asked) == 1
    assert names(tmp_path) == []


def test_a_wrong_hash_names_both_and_leaves_nothing(site, tmp_path):
    path = tmp_path / "x.bin"
    site.body = BODY[:-1] + b"!"
    wrong = hashlib.md5(site.body).hexdigest()
    with pytest.raises(DownloadError) as error:
        download(site.url(), path, md5=MD5)
    assert str(error.value) == f"{path}: md5 is {wrong}, expected {MD5}; try again, or another address"
    assert names(tmp_path) == []
    site.body = BODY
    assert download(site.url(), path, md5=MD5).verified
    assert site.asked[1][1] is None


def test_a_wrong_hash_leaves_the_old_file(site, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"old")
    with pytest.raises(DownloadError, match=f"sha256 is {SHA256}, expected {'0' * 64}"):
        download(site.url(), tmp_path / "x.bin", md5=MD5, sha256="0" * 64)
    assert (tmp_path / "x.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["x.bin"]


def test_a_wrong_size_is_seen_before_the_body(site, tmp_path):
    with pytest.raises(DownloadError, match=r"3000000 bytes at http://127.0.0.1:\d+/data.bin, not 17; check"):
        download(site.url(), tmp_path / "x.bin", size=17)
    site.send_length = False
    with pytest.raises(DownloadError, match=r"x.bin: 3000000 bytes arrived, expected 17; check the address"):
        download(site.url(), tmp_path / "x.bin", size=17)
    assert names(tmp_path) == []


def test_redirects_are_followed_and_carry_the_range(site, tmp_path):
    site.drops = [1_000_000]
    assert download(site.url("/to//data.bin"), tmp_path / "x.bin", md5=MD5, sleep=Naps()).verified
    assert site.asked == [
        ("/to//data.bin", None, None),
        ("/data.bin", None, None),
        ("/to//data.bin", "bytes=1000000-", '"v1"'),
        ("/data.bin", "bytes=1000000-", '"v1"'),
    ]


@pytest.mark.parametrize("path", ["/loop", "/to/file:///etc/passwd", "/to/ftp://127.0.0.1/x"])
def test_redirects_in_a_circle_or_off_the_web_are_refused(site, tmp_path, path):
    with pytest.raises(DownloadError) as error:
        download(site.url(path), tmp_path / "x.bin")
    assert str(error.value).startswith(
        f"{tmp_path / 'x.bin'}: it redirects in a circle, or to something that is not http or https ("
    )
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://h/x", "data:,x", "x.tar.gz", "", "http://", "http://[::1", "http://h:99999/",
     "http://h/a b", "http://h/a\nb"],
)  # fmt: skip
def test_only_web_addresses_are_taken(tmp_path, url):
    with pytest.raises(UsageError) as error:
        download(url, tmp_path / "x.bin")
    assert str(error.value) == (f"{tmp_path / 'x.bin'}: cannot download from {url!r}; give an http or https address")


def test_a_password_in_the_address_is_not_repeated(tmp_path):
    with pytest.raises(UsageError) as error:
        download("https://me:secret@host/x?key=secret", tmp_path / "x.bin")
    assert str(error.value) == (
        f"{tmp_path / 'x.bin'}: user names in an address are not supported; fetch https://host/x by hand"
    )


def test_a_hash_that_is_none(tmp_path):
    with pytest.raises(UsageError, match="'abc' is no md5; give 32 hexadecimal digits"):
        download("http://127.0.0.1/x", tmp_path / "x", md5="abc")


def test_a_server_that_is_not_there_fails_at_once(site, tmp_path):
    naps = Naps()
    with pytest.raises(DownloadError) as error:
        download("http://127.0.0.1:1/x?key=secret", tmp_path / "x.bin", sleep=naps)
    assert str(error.value) == (
        f"{tmp_path / 'x.bin'}: cannot reach http://127.0.0.1:1/x (Connection refused); check address and network"
    )
    assert naps == []


def test_too_little_space_is_seen_before_the_first_byte(site, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**7, 8 * 10**6, 2 * 10**6))
    with pytest.raises(StorageError) as error:
        download(site.url(), tmp_path / "x.bin")
    assert str(error.value) == (
        f"{tmp_path / 'x.bin.part'}: the disk is full (2000000 bytes free, 3000000 needed); "
        "free some space, then run it again"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up(site, tmp_path, monkeypatch):
    import jasper_asr.data.download as module

    def open_full(path, mode, **options):
        return open("/dev/full" if str(path).endswith(".part") else path, mode, **options)

    monkeypatch.setattr(module, "open", open_full, raising=False)
    with pytest.raises(StorageError, match=r"x.bin.part: the disk is full \(No space left on device\); free"):
        download(site.url(), tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()


def test_a_folder_that_cannot_be_made(site, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/x.bin: (File exists|Not a directory); check the path"):
        download(site.url(), tmp_path / "file" / "x.bin")


# --- archives ---------------------------------------------------------------------------------------------


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def tar_gz(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


TREE = [
    member("LibriSpeech", kind=tarfile.DIRTYPE),
    member("LibriSpeech/README.TXT", b"read me"),
    member("LibriSpeech/dev-clean/84/121123/84-121123.trans.txt", b"84-121123-0000 GO DO YOU HEAR\n"),
    member("./LibriSpeech/dev-clean/84/121123/84-121123-0000.flac", BODY[:60_000]),
]


def test_a_tree_is_unpacked_and_merged(tmp_path):
    out = tmp_path / "out"
    (out / "LibriSpeech" / "test-clean").mkdir(parents=True)
    (out / "LibriSpeech" / "test-clean" / "keep").write_bytes(b"k")
    (out / "LibriSpeech" / "README.TXT").write_bytes(b"older")
    (out / ".a.tar.gz.unpacking" / "left").mkdir(parents=True)  # of a killed run
    seen = []
    archive = tar_gz(tmp_path / "a.tar.gz", *TREE)
    assert extract_tar(archive, out, progress=lambda *args: seen.append(args)) == out
    assert names(out) == ["LibriSpeech"]
    assert names(out / "LibriSpeech") == ["README.TXT", "dev-clean", "test-clean"]
    assert (out / "LibriSpeech" / "README.TXT").read_bytes() == b"read me"
    assert (out / "LibriSpeech" / "test-clean" / "keep").read_bytes() == b"k"
    chapter = out / "LibriSpeech" / "dev-clean" / "84" / "121123"
    assert (chapter / "84-121123-0000.flac").read_bytes() == BODY[:60_000]
    assert seen[-1] == (archive.stat().st_size, archive.stat().st_size)
    assert len(seen) == len(TREE)


BAD_MEMBERS = {
    "absolute": (member("/tmp/x", b"x"), "member '/tmp/x' would leave the folder"),
    "dots": (member("a/../../x", b"x"), "member 'a/../../x' would leave the folder"),
    "backslash": (member("..\\x", b"x"), r"member '..\\x' would leave the folder"),
    "drive": (member("C:x", b"x"), "member 'C:x' would leave the folder"),
    "symlink": (member("a", kind=tarfile.SYMTYPE, link="/etc"), "member 'a' is a link or device"),
    "hardlink": (member("a", kind=tarfile.LNKTYPE, link="../b"), "member 'a' is a link or device"),
    "device": (member("a", kind=tarfile.CHRTYPE), "member 'a' is a link or device"),
    "fifo": (member("a", kind=tarfile.FIFOTYPE), "member 'a' is a link or device"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_members_that_must_not_be_unpacked(tmp_path, case):
    bad, message = BAD_MEMBERS[case]
    archive = tar_gz(tmp_path / "a.tar.gz", *TREE, bad)
    with pytest.raises(DownloadError) as error:
        extract_tar(archive, tmp_path / "deep" / "out")
    assert str(error.value) == f"{archive}: {message}; not unpacked"
    assert names(tmp_path / "deep" / "out") == []
    assert names(tmp_path) == ["a.tar.gz", "deep"]


def test_a_link_cannot_be_written_through(tmp_path):
    archive = tar_gz(
        tmp_path / "a.tar.gz",
        member("a", kind=tarfile.SYMTYPE, link=str(tmp_path)),
        member("a/planted", b"x"),
    )
    with pytest.raises(DownloadError, match="is a link or device"):
        extract_tar(archive, tmp_path / "out")
    assert not (tmp_path / "planted").exists()


def test_an_archive_that_unpacks_to_too_much(tmp_path):
    archive = tar_gz(tmp_path / "a.tar.gz", member("a", bytes(600)), member("b", bytes(401)))
    with pytest.raises(DownloadError, match=r"a.tar.gz: unpacks to more than 1000 bytes; not unpacked"):
        extract_tar(archive, tmp_path / "out", max_bytes=1000)
    assert names(tmp_path / "out") == []
    extract_tar(archive, tmp_path / "out", max_bytes=1001)
    assert names(tmp_path / "out") == ["a", "b"]


def damaged(whole):
    """Archives that end early, hold a flipped bit, or are none."""
    tar = gzip.decompress(whole)
    flipped = bytearray(tar)
    flipped[512] ^= 1  # the second header no longer fits its checksum; the gzip checksum does
    return {
        "half": whole[: len(whole) // 2],
        "no checksum": whole[:-4],
        "wrong checksum": whole[:-8] + bytes(4) + whole[-4:],
        "short tar": gzip.compress(tar[: len(tar) // 2], 1),
        "flipped header": gzip.compress(bytes(flipped), 1),
        "not gzip": tar,
        "not tar": gzip.compress(b"<html>" * 300),
        "empty": b"",
    }


@pytest.mark.parametrize(
    "case",
    ["half", "no checksum", "wrong checksum", "short tar", "flipped header", "not gzip", "not tar", "empty"],
)
def test_damaged_archives(tmp_path, case):
    archive = tar_gz(tmp_path / "a.tar.gz", *TREE)
    archive.write_bytes(damaged(archive.read_bytes())[case])
    with pytest.raises(DownloadError) as error:
        extract_tar(archive, tmp_path / "out")
    assert str(error.value).startswith(f"{archive}: truncated or damaged (")
    assert str(error.value).endswith("); delete it and download it again")
    assert names(tmp_path / "out") == []


def test_an_archive_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match=r"a.tar.gz: No such file or directory; check the path"):
        extract_tar(tmp_path / "a.tar.gz", tmp_path / "out")


# --- checkpoints ------------------------------------------------------------------------------------------


def zip_of(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in members:
            archive.writestr(name, b"x")
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return (sys.exit, (99,))


CHECKPOINTS = {
    "torch": (zip_of("archive/data.pkl", "archive/version"), "PyTorch checkpoint", ()),
    "legacy": (
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(Bomb(), protocol=2),
        "PyTorch checkpoint (legacy format)",
        (),
    ),
    "zip": (zip_of("readme.md", "jasper.pt"), "zip archive", ("jasper.pt",)),
    "safetensors": ((2).to_bytes(8, "little") + b"{}", "safetensors file", ()),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_is_named_not_unpickled(site, tmp_path, case):
    site.body, kind, members = CHECKPOINTS[case]
    found = download_checkpoint(site.url(), tmp_path / "c.pt")
    assert (found.kind, found.members, found.download.verified) == (kind, members, False)
    assert (tmp_path / "c.pt").read_bytes() == site.body
    sha256 = hashlib.sha256(site.body).hexdigest()
    assert download_checkpoint(site.url(), tmp_path / "c.pt", sha256=sha256).download.verified


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\n <!DOCTYPE html>", "a web page, not a checkpoint; the address may need a login"),
        (zip_of("readme.md"), "not a checkpoint, nor a zip that holds one; check the address"),
        (zip_of("jasper.pt")[:-9], "not a checkpoint, nor a zip that holds one; check the address"),
        (b"", "not a checkpoint, nor a zip that holds one; check the address"),
    ],
)
def test_what_is_no_checkpoint(site, tmp_path, body, message):
    site.body = body
    with pytest.raises(DownloadError) as error:
        download_checkpoint(site.url(), tmp_path / "c.pt")
    assert str(error.value) == f"{tmp_path / 'c.pt'}: {message}"


def test_no_default_address_is_made_up(tmp_path):
    with pytest.raises(UsageError, match=f"c.pt: no address .* {NVIDIA_CHECKPOINT_PAGE}: pass the address"):
        download_checkpoint(None, tmp_path / "c.pt")
