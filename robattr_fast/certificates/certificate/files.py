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
    """Reads tensors and manifest from `path`.

    Raises:
        OSError: the file cannot be read.
        CertificateFileError: it is not a certificate, or any byte of it has changed.
    """

    def fault(reason: str) -> CertificateFileError:
        return CertificateFileError(f"{os.fspath(path)}: {reason}")

    with open(path, "rb") as file:
        start = file.read(8)
        header = int.from_bytes(start, "little")
        if len(start) < 8:
            raise fault(f"only {len(start)} bytes long")
        if header > MAX_HEADER:
            raise fault(f"header of {header} bytes, at most {MAX_HEADER} are accepted")
        data = start + file.read()
    if len(data) < 8 + header:
        raise fault(f"cut short: the header alone has {header} bytes, the file {len(data)}")
    try:
        metadata = json.loads(data[8 : 8 + header])["__metadata__"]
        kind, digest, manifest = metadata["format"], metadata["sha256"], metadata["manifest"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise fault("not a certificate: no manifest in its header") from error
    if kind != FORMAT:
        raise fault(f"format {kind!r}, expected {FORMAT!r}")
    filled, blank = (f'"sha256":"{value}"'.encode() for value in (digest, _BLANK))
    if hashlib.sha256(data.replace(filled, blank, 1)).hexdigest() != digest:
        raise fault("checksum does not match: the file is damaged")
    try:
        tensors = safetensors.torch.load(data)
        held = tensors.pop(_MANIFEST, None)
        manifest = json.loads(manifest if held is None else held.numpy().tobytes())
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise fault(f"contents cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise fault("the manifest is not an object")
    return tensors, manifest
