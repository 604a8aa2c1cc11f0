"""Bytes onto a disk: whole, or not at all; one process at a time."""

import errno
import fcntl
import os
import pathlib
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager

# What a killed writer leaves: see `write_atomically`.
_PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_LOCK = ".robattr-fast.lock"
_NO_LOCKS_ON_FOLDERS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)


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


def append_line(path: str | os.PathLike, line: str) -> None:
    """Adds a line to a file, made if missing, in one write. What a killed writer left of another line is ended first.

    Survives the death of the process; a loss of power may cost the last lines. Hold `locked` where others append too.
    Raises OSError, ValueError if the text holds a line end.
    """
    if "\n" in line:
        raise ValueError("line: got several, expected one")
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = False
        if end:
            file.seek(end - 1)
            torn = file.read(1) != b"\n"
        data = (("\n" if torn else "") + line + "\n").encode()
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))


def sweep(folder: str | os.PathLike, names: Collection[str]) -> None:
    """Removes what killed writers left of the files ``names``, which no other process is writing to."""
    for part in pathlib.Path(folder).iterdir():
        match = _PART.fullmatch(part.name)
        if match and match[1] in names:
            part.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Alone in the folder, among the processes that ask: others wait. Ends with the process, however that dies.

    The lock is on the folder itself, and on a hidden file where the file system (NFS) takes none on folders.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS_ON_FOLDERS:
                raise
            os.close(descriptor)
            descriptor = os.open(pathlib.Path(folder) / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the descriptor on
    finally:
        os.close(descriptor)
