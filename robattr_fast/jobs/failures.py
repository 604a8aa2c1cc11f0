"""What wrong input raises, and how a person reads it: one line, no traceback."""

from __future__ import annotations

from robattr_fast.errors import BackendError, CertificateFileError, MergeError, ModelError

EXPECTED = (ValueError, TypeError, OSError, ModelError, BackendError, MergeError, CertificateFileError)
"""What wrong input raises; anything else is a bug and keeps its traceback."""


def one_line(error: BaseException) -> str:
    """The message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def described(error: BaseException) -> str:
    """The message on one line, after the kind of error where that is not an expected one."""
    return one_line(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {one_line(error)}"
