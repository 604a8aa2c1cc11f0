"""Names are data: file names, class names and error texts, as they may be shown on a terminal, a page or in a table."""

from __future__ import annotations

import re
import unicodedata

# Control characters, lone surrogates (bytes of a file name that are no UTF-8), line and paragraph ends.
_HIDDEN = ("Cc", "Cs", "Zl", "Zp")
# These turn the direction of the text that follows: "gpj.exe" reads "exe.jpg".
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ESCAPE = re.compile(r"\\(\\|[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


def printable(text: str) -> str:
    r"""The text with what acts on a terminal, or cannot be written, as escapes: ``\x1b``, ``\n``, ``\udce9``."""
    if text.isprintable():
        return text
    return "".join(_escaped(char) for char in text)


def cell(text: str) -> str:
    """The text for one cell of a table: `printable`, on one line, and `from_cell` gives it back."""
    return printable(text.replace("\\", "\\\\"))


def from_cell(text: str) -> str:
    """Inverse of `cell`. Tables of before, which hold names as they are, are read as long as those have no escapes."""
    return _ESCAPE.sub(lambda match: "\\" if match[1] == "\\" else _char(match[0]), text)


def listed(names: list[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _escaped(char: str) -> str:
    if char in _TURNING or unicodedata.category(char) in _HIDDEN:
        return char.encode("unicode_escape").decode()
    return char


def _char(escape: str) -> str:
    number = {"n": 10, "r": 13, "t": 9}.get(escape[1])
    number = int(escape[2:], 16) if number is None else number
    return chr(number) if number < 0x110000 else escape
