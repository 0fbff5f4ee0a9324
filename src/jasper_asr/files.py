"""Writing files whole or not at all."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from jasper_asr.errors import StorageError


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` under a temporary name in the same folder, then rename: a killed run leaves the old file.

    Raises StorageError when that fails; nothing is left behind.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.writelines(_one_ahead(pieces))
        os.replace(temporary, path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"{path}: cannot be written ({reason}); check the folder and free space") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _one_ahead(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """`pieces`, the next of which is made while this one is written."""
    source = iter(pieces)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, source, None)
        while (piece := following.result()) is not None:
            following = pool.submit(next, source, None)
            yield piece
