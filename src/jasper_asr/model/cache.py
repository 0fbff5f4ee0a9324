"""Graphs that were built from checkpoints, kept on disk, so that the next start opens a file and builds nothing.

A graph lies in `<cache folder>/<stem>-<16 hex digits>/<16 hex digits>.onnx`, large weights beside it. The folder stands
for the checkpoint's path and how it is to be built, the file's name for the checkpoint's content (inode, size and time
of change) and for our own code: a checkpoint that changes replaces its graph. The environment variable JASPER_CACHE
names another cache folder, or, if empty, turns this off. Whatever goes wrong here only costs the time to build again.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from jasper_asr._version import __version__
from jasper_asr.config import ModelConfig
from jasper_asr.errors import ModelError, StorageError

Opened = TypeVar("Opened")

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
    if kept and kept.is_file():
        with suppress(OSError):
            os.utime(kept)  # others go before it
        with suppress(ModelError):  # if not its fault, it comes again
            return open_graph(kept)
    from jasper_asr.model.checkpoint import load_checkpoint
    from jasper_asr.model.export import graph_source, stored_bytes, write_graph

    checkpoint = load_checkpoint(path, config=config, weights=weights)
    if kept and _make_room(kept, stored_bytes(checkpoint, **shape)):
        with suppress(StorageError):
            write_graph(checkpoint, kept, **shape)
            return open_graph(kept)
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
    """Where the graph of `checkpoint`, built with `options`, is or would be; None without a cache."""
    try:
        folder = cache_folder()
        if folder is None:
            return None
        stat = checkpoint.stat()
        build = [str(checkpoint.resolve()), config and config.raw, sorted(options.items())]
        content = [stat.st_ino, stat.st_size, stat.st_mtime_ns, __version__, _own_code()]
        return folder / f"{checkpoint.stem}-{_digest(build)}" / f"{_digest(content)}.onnx"
    except (OSError, RuntimeError):  # no home folder, for one
        return None


def _make_room(path: Path, size: int) -> bool:
    """Prepare the folder of `path` for a graph of `size` bytes; False where it cannot be kept.

    The checkpoint's older graph goes, and as many others as the limit asks for, those unused for longest first.
    """
    entry, cache = path.parent, path.parent.parent
    try:
        entry.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in entry.iterdir():
            old.unlink()
        graphs = sorted(cache.glob("*/*.onnx"), key=lambda graph: graph.stat().st_mtime)
        sizes = {graph.parent: sum(file.stat().st_size for file in graph.parent.iterdir()) for graph in graphs}
        total = sum(sizes.values()) + size
        for folder, freed in sizes.items():
            if total > LARGEST_CACHE:
                shutil.rmtree(folder)
                total -= freed
        return total <= LARGEST_CACHE and shutil.disk_usage(entry).free > 2 * size
    except OSError:
        return False


def _own_code() -> list[Any]:
    """What tells one state of the code that builds graphs from another, without reading it."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]


def _digest(facts: list[Any]) -> str:
    return sha256(json.dumps(facts).encode()).hexdigest()[:16]
