"""Bytes onto a disk: whole, or not at all."""

import os
import pathlib
import secrets


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Replaces the file at `path` by `data`, or leaves it as it was: a reader never sees a part.

    Raises OSError if the folder is missing, not writable or full.
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: str | os.PathLike) -> None:
    """Removes what killed writers left in a folder that no other process is writing to."""
    for part in pathlib.Path(folder).glob(".*.????????.tmp"):
        part.unlink(missing_ok=True)
