"""Fetch a file over HTTP so that it arrives whole or not at all, unpack an archive, name a checkpoint.

The only module that talks to the network. A transfer goes to `<path>.part`, with what the server said about
the file in `<path>.part.json`; the next attempt, or the next run, asks for the rest only (RFC 9110, section
14: `Range` with `If-Range`). The file gets its own name after its length and hash have been checked.
"""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.message import Message
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn
from urllib.parse import urlsplit, urlunsplit

from jasper_asr._version import __version__
from jasper_asr.errors import DownloadError, StorageError, UsageError

Progress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all or None where nobody knows)."""

# The page on which NVIDIA publishes the Jasper 10x5 checkpoint (nvidia_jasper_210205.pt), as NVIDIA's own
# Jasper README names it. The page was NOT opened and its file NOT fetched when this was written, so there is
# no default address of the file and no hash of it here: both are for whoever downloads it to give.
NVIDIA_CHECKPOINT_PAGE = "https://ngc.nvidia.com/catalog/models/nvidia:jasper_pyt_ckpt_amp"

MAX_UNPACKED_BYTES = 100 * 10**9
"""Limit on what one archive may unpack to; train-other-500, the largest of LibriSpeech, stays well below."""

_CHUNK = 1 << 18
_GAIN = 1 << 20  # an attempt that moved on by this much was no failure: the count of retries starts again
_BACKOFF = 0.5  # seconds before the first retry, doubled before each further one
_LONGEST_WAIT = 30.0
_WORTH_RETRYING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class DownloadResult:
    """A file that is here and whole. `verified`: its hash was compared with one that the caller gave."""

    path: Path
    bytes: int
    sha256: str
    md5: str
    verified: bool


@dataclass(frozen=True)
class CheckpointFile:
    """A downloaded checkpoint: what kind of file it is, and the checkpoints in it where it is a zip."""

    download: DownloadResult
    kind: str
    members: tuple[str, ...] = ()


def download(
    url: str,
    path: str | os.PathLike[str],
    *,
    md5: str | None = None,
    sha256: str | None = None,
    size: int | None = None,
    retries: int = 5,
    timeout: float = 30.0,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> DownloadResult:
    """Fetch `url` to `path`, going on where an earlier attempt or run stopped.

    `md5`, `sha256` (hexadecimal) and `size` (bytes) are compared before the file gets its name. A file that
    is already there is kept without asking the server if its hash is the one given; where no hash is given,
    if its size is the one that the server announces. Otherwise it is replaced. `retries` counts attempts in
    a row that brought less than 1 MiB; `timeout` is in seconds of silence.

    Raises UsageError (address or hash that cannot be one), DownloadError (transfer failed, hash or size
    differs) and StorageError (disk full or not writable).
    """
    path = Path(path)
    wanted = _wanted_hashes(path, md5, sha256)
    _check_url(path, url)
    if wanted and path.is_file():
        present = _describe(path, wanted)
        if present.verified:
            return present
    transfer = _Transfer(url, path, size, timeout, progress, may_keep=not wanted)
    with _storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    arrived = transfer.run(retries, sleep)
    result = _describe(arrived, wanted)
    if size is not None and result.bytes != size:
        transfer.discard()
        raise DownloadError(f"{path}: {result.bytes} bytes arrived, expected {size}; check the address")
    if wanted and not result.verified:
        transfer.discard()
        raise DownloadError(f"{path}: {_difference(result, wanted)}; try again, or another address")
    if arrived != path:
        with _storage(path):
            os.replace(arrived, path)
        transfer.discard()
    return replace(result, path=path)


def extract_tar(
    archive: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    max_bytes: int = MAX_UNPACKED_BYTES,
) -> Path:
    """Unpack a .tar.gz of files and folders into `out_dir`, all or nothing, and return `out_dir`.

    It is unpacked into a hidden folder beside its destination, checked to the last byte (the gzip checksum
    comes last), and then moved: folders that are there already are merged into, files replaced. `progress`
    gets the bytes of the archive read so far, and its size.

    Only plain files and folders are written. A member with an absolute name or `..`, a link, a device, or
    more than `max_bytes` in all raises DownloadError, as does a truncated or damaged archive; a disk that is
    full or not writable raises StorageError. Nothing is left in `out_dir` then.
    """
    archive, out_dir = Path(archive), Path(out_dir)
    staging = out_dir / f".{archive.name}.unpacking"
    with _storage(out_dir):
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(parents=True)
    try:
        with _storage(out_dir):
            _unpack(archive, staging, progress, max_bytes)
            _merge(staging, out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out_dir


def download_checkpoint(
    url: str | None,
    out: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    md5: str | None = None,
    progress: Progress | None = None,
) -> CheckpointFile:
    """Fetch a model checkpoint to `out` and say what kind of file it is; nothing in it is unpickled.

    Without a hash the result's `download.verified` is False: nobody has compared the file with anything.
    Raises UsageError where `url` is None, DownloadError where what came is no checkpoint (a login page,
    often), and all that `download` raises.
    """
    if url is None:
        raise UsageError(
            f"{out}: no address to download from; NVIDIA publishes its checkpoint at "
            f"{NVIDIA_CHECKPOINT_PAGE}: pass the address of the file there"
        )
    result = download(url, out, sha256=sha256, md5=md5, progress=progress)
    kind, members = _checkpoint_kind(result.path)
    return CheckpointFile(result, kind, members)


# --- one transfer -----------------------------------------------------------------------------------------


class _BrokenTransferError(Exception):
    """A transfer that broke in a way that another attempt may mend."""


@dataclass
class _Transfer:
    """Fetches `url` into `part`, one HTTP request an attempt. `may_keep`: a `path` of equal size will do."""

    url: str
    path: Path
    size: int | None
    timeout: float
    progress: Progress | None
    may_keep: bool
    reached: bool = False

    def __post_init__(self) -> None:
        self.part = self.path.with_name(self.path.name + ".part")
        self.notes = self.path.with_name(self.path.name + ".part.json")

    def run(self, retries: int, sleep: Callable[[float], None]) -> Path:
        """Attempt until all bytes are here; return the file that holds them: `part`, or `path` if kept."""
        failures = 0
        while True:
            before = _size(self.part)
            try:
                return self.attempt()
            except _BrokenTransferError as error:
                failures = 1 if _size(self.part) - before >= _GAIN else failures + 1
                if failures > retries:
                    raise DownloadError(
                        f"{self.path}: {error}, and {retries} retries did not help; run it again later, "
                        f"the first {_size(self.part)} bytes are kept"
                    ) from error
            sleep(min(_BACKOFF * 2 ** (failures - 1), _LONGEST_WAIT))

    def attempt(self) -> Path:
        notes = self._read_notes()
        offset = _size(self.part) if notes else 0
        try:
            response = self._open(offset, notes)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and offset and self._is_whole(error.headers, offset, notes):
                    return self.part
                self._refuse(error)
        with response:
            start, total = self._start_and_total(response, offset, notes)
            if self.size is not None and total is not None and total != self.size:
                raise DownloadError(
                    f"{self.path}: {total} bytes at {_shown(self.url)}, not {self.size}; check the address"
                )
            if start == 0:
                if self.may_keep and total is not None and self.path.is_file() and _size(self.path) == total:
                    return self.path
                self._start_over(response.headers, total)
            self._receive(response, start, total)
        return self.part

    def discard(self) -> None:
        """Remove what an unfinished transfer keeps."""
        with _storage(self.path):
            self.part.unlink(missing_ok=True)
            self.notes.unlink(missing_ok=True)

    def _open(self, offset: int, notes: Mapping[str, object]) -> HTTPResponse:
        # identity: a range of a compressed representation would be a range of other bytes
        headers = {"User-Agent": f"jasper-asr/{__version__}", "Accept-Encoding": "identity"}
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": str(notes["validator"])}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            response: HTTPResponse = _opener().open(request, timeout=self.timeout)
        except urllib.error.HTTPError:
            self.reached = True
            raise
        except (urllib.error.URLError, ValueError) as error:  # ValueError: a name that is no host name
            if self.reached:
                raise _BrokenTransferError(f"no connection ({_reason(error)})") from error
            raise DownloadError(
                f"{self.path}: cannot reach {_shown(self.url)} ({_reason(error)}); check address and network"
            ) from error
        except (HTTPException, OSError) as error:
            raise _BrokenTransferError(f"the server broke off ({_reason(error)})") from error
        self.reached = True
        return response

    def _start_and_total(
        self, response: HTTPResponse, offset: int, notes: Mapping[str, object]
    ) -> tuple[int, int | None]:
        """Where the body of this answer starts, and the size of the whole file where the server says it."""
        if response.status == 206:
            start, total = _content_range(response.headers)
            same = start == offset and total in (None, notes.get("size", total))
            if not same or _validator(response.headers) not in (None, notes.get("validator")):
                self.discard()
                raise _BrokenTransferError("the file on the server has changed")
            return offset, total
        if response.status not in (200, 203):
            raise DownloadError(f"{self.path}: HTTP {response.status} from {_shown(self.url)}; check the address")
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None

    def _receive(self, response: HTTPResponse, start: int, total: int | None) -> None:
        with _storage(self.part):
            free = shutil.disk_usage(self.part.parent).free
            if total is not None and total - start > free:
                raise OSError(errno.ENOSPC, f"{free} bytes free, {total - start} needed")
            # unbuffered, so that the length of the file is what was received, whatever happens next
            file = open(self.part, "ab" if start else "wb", buffering=0)  # noqa: SIM115
        with file:
            done = start
            self._report(done, total)
            while total is None or done < total:
                chunk = _read_some(response, _CHUNK if total is None else min(_CHUNK, total - done))
                if not chunk:
                    break
                with _storage(self.part):
                    _write_all(file, chunk)
                done += len(chunk)
                self._report(done, total)
            with _storage(self.part):
                os.fsync(file.fileno())
        if total is not None and done < total:
            raise _BrokenTransferError(f"the connection closed at byte {done} of {total}")

    def _report(self, done: int, total: int | None) -> None:
        if self.progress:
            self.progress(done, total)

    def _is_whole(self, headers: Message, offset: int, notes: Mapping[str, object]) -> bool:
        """Whether "no such range" means that `part` has all bytes (a run killed before it could rename)."""
        stated = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
        return offset == (int(stated[1]) if stated else notes.get("size"))

    def _refuse(self, error: urllib.error.HTTPError) -> NoReturn:
        if error.code == 416:
            self.discard()
            raise _BrokenTransferError("the server has no such range") from error
        if error.code in _WORTH_RETRYING:
            raise _BrokenTransferError(f"HTTP {error.code} from {_shown(self.url)}") from error
        if 300 <= error.code < 400:
            cause = "it redirects in a circle, or to something that is not http or https"
        else:
            cause = f"HTTP {error.code} {error.reason}".rstrip()
        raise DownloadError(f"{self.path}: {cause} ({_shown(self.url)}); check the address") from error

    def _start_over(self, headers: Message, total: int | None) -> None:
        """Forget what is there, then note what the server says of the file: in this order, so that a kill in
        between never leaves old bytes under new notes."""
        self.discard()
        validator = _validator(headers)
        if validator is None:
            return
        notes = {"url": self.url, "validator": validator} | ({} if total is None else {"size": total})
        draft = self.notes.with_name(self.notes.name + ".tmp")
        with _storage(self.notes):
            draft.write_text(json.dumps(notes), encoding="utf-8")
            os.replace(draft, self.notes)

    def _read_notes(self) -> Mapping[str, object]:
        """What is known of the file that `part` is the beginning of; empty if it cannot be gone on with."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        usable = isinstance(notes, dict) and notes.get("url") == self.url
        return notes if usable and isinstance(notes.get("validator"), str) else {}


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only; the base class would go to ftp as well."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """An opener without handlers for file:, ftp: and data:, which urllib adds unless it is built by hand."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _WebRedirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _read_some(response: HTTPResponse, limit: int) -> bytes:
    try:
        # read1 hands over what has come; read would wait for `limit` bytes, and lose some if the line breaks
        return response.read1(limit)
    except (HTTPException, OSError) as error:
        raise _BrokenTransferError(f"the connection broke ({_reason(error)})") from error


def _write_all(file: IO[bytes], chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


def _validator(headers: Message) -> str | None:
    """What `If-Range` may carry: a strong ETag, else the date of the last change."""
    etag: str | None = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


def _content_range(headers: Message) -> tuple[int, int | None]:
    stated = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if not stated:
        return -1, None  # equals no offset
    return int(stated[1]), None if stated[2] == "*" else int(stated[2])


# --- hashes, addresses, errors ----------------------------------------------------------------------------


def _describe(path: Path, wanted: Mapping[str, str]) -> DownloadResult:
    """Hash the file as it lies on the disk, and compare with the hashes that are wanted."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    length = 0
    with _storage(path), open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            md5.update(chunk)
            sha256.update(chunk)
            length += len(chunk)
    result = DownloadResult(path, length, sha256.hexdigest(), md5.hexdigest(), verified=False)
    return replace(result, verified=bool(wanted) and not _difference(result, wanted))


def _difference(result: DownloadResult, wanted: Mapping[str, str]) -> str:
    found = {"md5": result.md5, "sha256": result.sha256}
    return ", ".join(f"{k} is {found[k]}, expected {v}" for k, v in wanted.items() if found[k] != v)


def _wanted_hashes(path: Path, md5: str | None, sha256: str | None) -> dict[str, str]:
    given = {"md5": (md5, 32), "sha256": (sha256, 64)}
    wanted = {name: (value.strip().lower(), digits) for name, (value, digits) in given.items() if value}
    for name, (value, digits) in wanted.items():
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            raise UsageError(f"{path}: {value!r} is no {name}; give {digits} hexadecimal digits")
    return {name: value for name, (value, _) in wanted.items()}


def _check_url(path: Path, url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port over 65535
        usable = False
    if usable and "@" in parts.netloc:
        raise UsageError(f"{path}: user names in an address are not supported; fetch {_shown(url)} by hand")
    if not usable or not re.fullmatch(r"[!-~]+", url):
        raise UsageError(f"{path}: cannot download from {url!r}; give an http or https address")


def _shown(url: str) -> str:
    """The address without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", error)
    words = getattr(reason, "strerror", None) or reason
    return " ".join(str(words).split()) or type(reason).__name__


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Turn what the disk says into one StorageError line; errors of ours pass through."""
    try:
        yield
    except (StorageError, DownloadError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{path}: the disk is full ({error.strerror}); free some space, then run it again"
            ) from error
        reason = error.strerror or _reason(error)
        raise StorageError(f"{path}: {reason}; check the path and its permissions") from error


# --- archives and checkpoints -----------------------------------------------------------------------------


def _unpack(archive: Path, folder: Path, progress: Progress | None, max_bytes: int) -> None:
    with _storage(archive):
        raw = open(archive, "rb")  # noqa: SIM115
    with raw:
        try:
            with gzip.GzipFile(fileobj=raw) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                total = 0
                for member in tar:
                    total += member.size
                    if total > max_bytes:
                        raise DownloadError(f"{archive}: unpacks to more than {max_bytes} bytes; not unpacked")
                    _unpack_member(archive, tar, member, folder)
                    if progress:
                        progress(raw.tell(), _size(archive))
                _check_tail(stream)
        except (tarfile.TarError, EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
            raise DownloadError(
                f"{archive}: truncated or damaged ({_reason(error)}); delete it and download it again"
            ) from error


def _check_tail(stream: gzip.GzipFile) -> None:
    """Read to the end, where gzip keeps its checksum. tarfile takes a damaged header for the end of the
    archive; what follows the true end is zeros."""
    while rest := stream.read(_CHUNK):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("data after the last member")


def _unpack_member(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one file or folder. Written by hand, not by `TarFile.extract`: the archives fetched here hold
    nothing but files and folders, so no name, link, owner or mode of the archive needs to be believed."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or set(member.name) & set("\\:\0"):
        raise DownloadError(f"{archive}: member {member.name!r} would leave the folder; not unpacked")
    if not (member.isreg() or member.isdir()) or member.size < 0:
        raise DownloadError(f"{archive}: member {member.name!r} is a link or device; not unpacked")
    target = folder / name
    with _storage(target):
        (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
        if member.isdir():
            return
        source = tar.extractfile(member)
        assert source is not None  # isreg() was checked
        file = open(target, "wb", buffering=0)  # noqa: SIM115
    with file, source:
        while chunk := source.read(_CHUNK):
            with _storage(target):
                _write_all(file, chunk)


def _merge(source: Path, target: Path) -> None:
    """Move the content of `source` into `target`. A folder that is new arrives by one rename, whole."""
    for entry in sorted(source.iterdir()):
        goal = target / entry.name
        if entry.is_dir() and goal.is_dir():
            _merge(entry, goal)
        else:
            os.replace(entry, goal)


# How `torch.save` began before it wrote zip files: protocol 2, then the pickled long 0x1950a86a20f9469cfc6c.
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".nemo", ".safetensors")


def _checkpoint_kind(path: Path) -> tuple[str, tuple[str, ...]]:
    with _storage(path), open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(_LEGACY_TORCH):
        return "PyTorch checkpoint (legacy format)", ()
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _size(path):
        return "safetensors file", ()
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(PurePosixPath(name).name == "data.pkl" for name in names):
                return "PyTorch checkpoint", ()
            members = tuple(name for name in names if name.lower().endswith(_CHECKPOINT_SUFFIXES))
            if members:
                return "zip archive", members
    if head.lstrip().startswith(b"<"):
        raise DownloadError(f"{path}: a web page, not a checkpoint; the address may need a login")
    raise DownloadError(f"{path}: not a checkpoint, nor a zip that holds one; check the address")
