"""Certificate files: safetensors with a JSON manifest in the header and a checksum over every byte.

The checksum detects damage, not forgery. Nothing in a file is executed.
"""

import hashlib
import json
import os
from typing import Any

import safetensors
import safetensors.torch
import torch

from robattr_fast.certificates.fields import shown
from robattr_fast.errors import CertificateFileError
from robattr_fast.files import write_atomically

FORMAT = "robattr-fast certificate 1"
MAX_HEADER = 1_000_000
"""Bytes. A longer header is refused before it is parsed."""

CHECKPOINT = "checkpoint."
"""Prefix of tensors that a checkpoint adds to the certificate so far; they are no part of the certificate."""

_BLANK = "0" * 64

_MANIFEST = "manifest"
"""Tensor that holds the manifest, uint8 of its JSON, where a header has no room for it: many images have long ones."""


def save(path: str | os.PathLike, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
    """Writes tensors and manifest to `path`, atomically.

    Raises ValueError if the manifest is longer than a header may be, OSError if the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(manifest, allow_nan=False)
    if len(text) > MAX_HEADER // 2:
        tensors[_MANIFEST] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        text = ""
    metadata = {"format": FORMAT, "manifest": text, "sha256": _BLANK}
    data = _in_order(safetensors.torch.save(tensors, metadata))
    header = int.from_bytes(data[:8], "little")
    if header > MAX_HEADER:
        raise ValueError(f"the manifest needs {header} bytes of {MAX_HEADER}: save fewer images per file")
    digest = hashlib.sha256(data).hexdigest()
    blank, filled = (f'"sha256":"{value}"'.encode() for value in (_BLANK, digest))
    if data[: 8 + header].count(blank) != 1:
        raise ValueError("the manifest must not contain a blank checksum")
    write_atomically(path, data.replace(blank, filled, 1))


def _in_order(data: bytes) -> bytes:
    """The same file with the names of its header sorted: safetensors writes them in an order of chance."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def load(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads tensors and manifest from `path`, its header first: what is no certificate is refused from that alone.

    Raises:
        OSError: the file cannot be read.
        CertificateFileError: it is not a certificate, or any byte of it has changed.
    """
    try:
        return _read(path)
    except _Fault as error:
        raise CertificateFileError(f"{os.fspath(path)}: {error}") from error.__cause__


class _Fault(Exception):
    """What is wrong with a file."""


def _read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _Fault(f"only {len(start)} bytes long")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            raise _Fault(f"header of {length} bytes, at most {MAX_HEADER} are accepted")
        header = file.read(length)
        if len(header) < length:
            raise _Fault(f"cut short: the header alone has {length} bytes, the file {8 + len(header)}")
        digest, text, size = _parsed(header)
        held = os.fstat(file.fileno()).st_size - 8 - length
        if held != size:
            raise _Fault(f"its header speaks of {size} bytes of data, the file has {held}: cut short or damaged")
        file.seek(0)
        data = file.read(8 + length + size)
    filled, blank = (f'"sha256":"{value}"'.encode() for value in (digest, _BLANK))
    seen = hashlib.sha256(start + header.replace(filled, blank, 1))
    seen.update(memoryview(data)[8 + length :])
    if seen.hexdigest() != digest or len(data) != 8 + length + size:
        raise _Fault("checksum does not match: the file is damaged")
    try:
        tensors = safetensors.torch.load(data)
        apart = tensors.pop(_MANIFEST, None)
        manifest = _json(text if apart is None else apart.numpy().tobytes())
    except (ValueError, TypeError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        raise _Fault(f"contents cannot be read: {shown(str(error))}") from error
    if not isinstance(manifest, dict):
        raise _Fault("the manifest is not an object")
    return tensors, manifest


def _parsed(header: bytes) -> tuple[str, str, int]:
    """Checksum, manifest, and how many bytes of data follow."""
    try:
        entries = _json(header)
        metadata = entries.pop("__metadata__")
        kind, digest, manifest = metadata["format"], metadata["sha256"], metadata["manifest"]
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise _Fault("not a certificate: no manifest in its header") from error
    if kind != FORMAT:
        raise _Fault(f"format {shown(kind)}, expected {FORMAT!r}")
    if not (isinstance(digest, str) and isinstance(manifest, str)):
        raise _Fault("checksum and manifest must be strings")
    if any(isinstance(end, bool) or not isinstance(end, int) or end < 0 for end in ends):
        raise _Fault("the header has no offsets of its tensors")
    return digest, manifest, max(ends, default=0)


def _json(text: str | bytes) -> Any:
    """ValueError for what is no JSON, for NaN and infinity, and for a name that stands twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
