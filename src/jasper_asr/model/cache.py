"""Graphs that were built from checkpoints, kept on disk, so that the next start opens a file and builds nothing.

A graph lies in `<cache folder>/<stem>-<16 hex digits>-<16 hex digits>/graph.onnx`, large weights beside it. The first
digits stand for the checkpoint's path and how it is to be built, the others for its content (inode, size and time of
change) and for our own code: a checkpoint that changes replaces its graph. A graph is made in a folder of its own and
moved into place, so processes that start together do not meet. The environment variable JASPER_CACHE names another
cache folder, or, if empty, turns this off. Whatever goes wrong here only costs the time to build again.
"""

import glob
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from jasper_asr._version import __version__
from jasper_asr.config import ModelConfig
from jasper_asr.errors import ModelError, StorageError

if TYPE_CHECKING:
    from jasper_asr.model.checkpoint import Checkpoint

Opened = TypeVar("Opened")

GRAPH = "graph.onnx"

LARGEST_CACHE = 12_000_000_000
"""Bytes of all graphs together; those that were not used for longest go first. Jasper 10x5 takes 1.3 to 4.6 GB."""


def open_built(
    path: Path,
    open_graph: Callable[[Path | bytes], Opened],
    *,
    config: ModelConfig | None = None,
    weights: str = "ema",
    **shape: Any,
) -> Opened:
    """What `open_graph` makes of the graph of a checkpoint file: of the kept one or, if there is none, of a new one.

    A kept graph that cannot be opened is built again. `shape` goes to `build_graph`, the rest to `load_checkpoint`.
    Raises as they and `open_graph` do.
    """
    kept = _place(path, config, weights=weights, **shape)
    if kept and (kept / GRAPH).is_file():
        with suppress(OSError):
            os.utime(kept)  # others go before it
        with suppress(ModelError):  # if not its fault, it comes again
            return open_graph(kept / GRAPH)
        shutil.rmtree(kept, ignore_errors=True)
    from jasper_asr.model.checkpoint import load_checkpoint
    from jasper_asr.model.export import graph_source

    checkpoint = load_checkpoint(path, config=config, weights=weights)
    if kept and _keep(checkpoint, kept, **shape):
        return open_graph(kept / GRAPH)
    with graph_source(checkpoint, **shape) as graph:
        return open_graph(graph)


def cache_folder() -> Path | None:
    """Where graphs are kept; None when JASPER_CACHE is empty."""
    named = os.environ.get("JASPER_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jasper-asr"


def _place(checkpoint: Path, config: ModelConfig | None, **options: Any) -> Path | None:
    """The folder where the graph of `checkpoint`, built with `options`, is or would be; None without a cache."""
    try:
        folder = cache_folder()
        if folder is None:
            return None
        stat = checkpoint.stat()
        build = [str(checkpoint.resolve()), config and config.raw, sorted(options.items())]
        content = [stat.st_ino, stat.st_size, stat.st_mtime_ns, __version__, _own_code()]
        return folder / f"{checkpoint.stem}-{_digest(build)}-{_digest(content)}"
    except (OSError, RuntimeError):  # no home folder, for one
        return None


def _keep(checkpoint: "Checkpoint", kept: Path, **shape: Any) -> bool:
    """Build the graph into the folder `kept`; False where it cannot be kept."""
    from jasper_asr.model.export import stored_bytes, write_graph

    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _make_room(kept, stored_bytes(checkpoint, **shape)):
            return False
        with TemporaryDirectory(prefix="new-", dir=kept.parent, ignore_cleanup_errors=True) as folder:
            write_graph(checkpoint, Path(folder) / GRAPH, **shape)
            with suppress(OSError):  # another process was faster: its graph is the same
                Path(folder).rename(kept)
        return (kept / GRAPH).is_file()
    except (OSError, StorageError):
        return False


def _make_room(kept: Path, size: int) -> bool:
    """Whether a graph of `size` bytes may be kept.

    The checkpoint's older graph goes, and as many others as the limit asks for, those unused for longest first.
    """
    for old in kept.parent.glob(f"{glob.escape(kept.name.rpartition('-')[0])}-*"):
        if old != kept:  # which another process may just have put there
            shutil.rmtree(old, ignore_errors=True)
    folders = sorted(
        (entry for entry in kept.parent.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime
    )
    sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in folders}
    total = sum(sizes.values()) + size
    for folder, freed in sizes.items():
        if total > LARGEST_CACHE:
            shutil.rmtree(folder)
            total -= freed
    return total <= LARGEST_CACHE and shutil.disk_usage(kept.parent).free > 2 * size


def _own_code() -> list[Any]:
    """What tells one state of the code that builds graphs from another, without reading it."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]


def _digest(facts: list[Any]) -> str:
    return sha256(json.dumps(facts).encode()).hexdigest()[:16]
