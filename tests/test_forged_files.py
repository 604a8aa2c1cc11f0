"""Files that somebody wrote by hand: contradictions are refused, true files never are, and nothing else gets out."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from robattr_fast.certificates.certificate import files
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.moments.concentration import GramSummary
from robattr_fast.certificates.moments.deflation import DeflatedSummary
from robattr_fast.certificates.settings import Settings
from robattr_fast.errors import CertificateFileError

RELEASED = Path(__file__).parent / "data" / "format-1.safetensors"
"""Written by the first format: no class of the image itself. Two maps [1, 6, 6] of 512 samples, in blocks of 256."""

GRAM = [field.name for field in dataclasses.fields(GramSummary)]
DEFLATED = [field.name for field in dataclasses.fields(DeflatedSummary)]
COLUMNS = GRAM + [f"deflated_{name}" for name in DEFLATED]


def maps(kind: str, samples: int, n: int, levels: int, seed: int = 0) -> torch.Tensor:
    """uint8 [1, samples, n], at most n // 4 elements of a sample not 0."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros((samples, n), np.uint8)
    k = n // 4
    if kind == "constant":
        drawn[:, :k] = levels
    elif kind == "common":  # all elements move together
        drawn[:, :k] = rng.integers(0, levels + 1, (samples, 1))
    elif kind == "blocks":  # first half and second half of the run differ
        drawn[: samples // 2, :k] = levels
        drawn[samples // 2 :, k : 2 * k] = rng.integers(0, levels + 1, (samples - samples // 2, k))
    elif kind == "random":
        for row in drawn:
            row[rng.choice(n, k, replace=False, p=(w := rng.permutation(n) + 1.0) / w.sum())] = levels
    elif kind == "rare":
        drawn[rng.random(samples) < 0.02, 0] = 1
    return torch.from_numpy(drawn)[None]


@pytest.mark.parametrize("kind", ["constant", "common", "blocks", "random", "rare", "zero"])
@pytest.mark.parametrize(("samples", "retain"), [(5, 4), (64, 64), (130, 40), (200, 50)])
@pytest.mark.parametrize("levels", [1, 15])
@pytest.mark.parametrize("n", [12, 90])
def test_true_files_are_read(tmp_path, kind, samples, retain, levels, n):
    cert = Certificate.from_samples(
        maps(kind, samples, n, levels), num_levels=levels, sigma=0.2, tau=0.25, retain=retain, slack=None
    )
    cert.save(tmp_path / "c")
    assert torch.equal(Certificate.load(tmp_path / "c").gram_summary, cert.gram_summary)


def rewritten(path: Path, tensors: dict | None = None, manifest: dict | None = None) -> None:
    held, said = files.load(path)
    files.save(path, held | (tensors or {}), said | (manifest or {}))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(RELEASED.read_bytes())
    return path


def test_a_file_of_the_released_format(saved):
    cert = Certificate.load(RELEASED)
    assert cert.overlap(7, [0.01, 0.05]).share.tolist() == [[6 / 7] * 2] * 2
    # What it proved when it was written; constants have become tighter since.
    assert (cert.cosine(0.05) >= torch.tensor([0.9447713568, 0.9849465686], dtype=torch.float64) * (1 - 1e-9)).all()
    assert (cert.radius(7, 0.5) >= torch.tensor([0.1993282368, 0.2817141895], dtype=torch.float64) * (1 - 1e-9)).all()
    assert cert.prediction().label.tolist() == [2, 2]
    assert int(cert.counts.sum()) == 2 * 512 * 7
    assert cert.clean_class is cert.clean_score is cert.agreement is None
    assert cert.disagreements() == [None, None]
    cert.save(saved)
    assert saved.read_bytes() == RELEASED.read_bytes()


@pytest.mark.parametrize(
    ("columns", "factor"),
    [
        (["eigenvalue"], 0.0),
        (["eigenvalue"], 1e3),
        (["fourth"], 0.0),
        (["fourth"], 1e6),
        (["norm2"], 0.5),
        (["norm2"], 4.0),
        (["half_norm2"], 100.0),
        (["half_eigenvalue"], 1e3),
        (["half_mean"], 1e6),
        (["half_eigenvalue", "half_norm2"], 0.0),
        (["deflated_eigenvalue"], 1e3),
        (["deflated_fourth"], 0.0),
        (["eigenvalue", "fourth", "half_eigenvalue", "half_norm2", "half_mean"], 0.0),
        (GRAM[2:], 1e300),
        (["rows"], 0.5),
        (["blocks"], 0.5),
    ],
)
def test_moments_that_contradict_the_counts(saved, columns, factor):
    summary = files.load(saved)[0]["gram_summary"]
    for column in columns:
        summary[:, COLUMNS.index(column)] *= factor
    rewritten(saved, {"gram_summary": summary})
    with pytest.raises(CertificateFileError):
        Certificate.load(saved)


def test_numbers_of_no_samples(saved):
    summary = files.load(saved)[0]["gram_summary"]
    summary[:, 0] = 0
    rewritten(saved, {"gram_summary": summary})
    with pytest.raises(CertificateFileError, match="numbers of none"):
        Certificate.load(saved)


WRONG = (
    None,
    True,
    1.5,
    -1,
    0,
    2**63,
    2**70,
    1e300,
    "x",
    "",
    "a\x1b[2Jb",
    "a\nb",
    "\u202e",
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
)


def loaded(path: Path) -> tuple[Certificate | None, str]:
    try:
        return Certificate.load(path), ""
    except CertificateFileError as error:
        return None, str(error)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings)])
def test_any_value_of_a_field_is_taken_or_refused(saved, name):
    """What is taken can be asked for everything; a refusal shows no control characters."""
    original = saved.read_bytes()
    for value in WRONG:
        saved.write_bytes(original)
        rewritten(saved, manifest={name: value})
        cert, refusal = loaded(saved)
        assert refusal.isprintable()
        if cert is None:
            continue
        cert.overlap(7, [0.0, 0.05, 1e300])
        cert.radius(7, 0.5)
        cert.prediction()
        if cert.has_second_moments:
            cert.cosine(0.05)
        assert repr(cert).isprintable()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"second_moment": 1}, "second_moment must be a bool"),
        ({"retain": True}, "retain must be an integer"),
        ({"image_ids": [True, 1]}, "image_ids must be an integer"),
        ({"planned_samples": {"a": 1}}, "planned_samples must be a sequence"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"explain": "a\x1b[31m"}, "printable"),
        ({"versions": {"torch": "2\n3"}}, "printable"),
        ({"versions": {"t\u2028": "2"}}, "printable"),
        ({"exploration": {"alpha": 0.05, "bound": "kl", "slack": True, "second_moment": False}}, "exploration.slack"),
        ({"exploration": {"alpha": 0.05}}, "missing"),
        ({"nobody": 1}, "unknown fields"),
        ({"clean_class": [0, 1]}, "clean_score"),
        ({"tau": 0.1, "gamma": 0.2}, "gamma"),
    ],
)
def test_fields_have_types_and_ranges(saved, changes, words):
    rewritten(saved, manifest=changes)
    with pytest.raises(CertificateFileError, match=words):
        Certificate.load(saved)


def raw(path: Path, edit) -> None:
    """The file with its header's JSON text edited, and a new checksum."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = edit(data[8:end].decode())
    header = header.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(saved, constant):
    raw(saved, lambda text: text.replace(r"\"sigma\": 0.2", rf"\"sigma\": {constant}"))
    with pytest.raises(CertificateFileError):
        Certificate.load(saved)
    with pytest.raises(ValueError, match="sigma"):
        Settings(sigma=math.nan, shape=(2,))


def test_a_name_that_stands_twice():
    with pytest.raises(ValueError, match="twice"):
        files._json('{"sigma": 1, "sigma": 2}')


def sparse(path: Path, entries: dict, size: int, metadata: dict | None = None) -> None:
    header = json.dumps({"__metadata__": metadata or {"format": "pt"}, **entries}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def test_what_is_no_certificate_is_refused_by_its_header(tmp_path, monkeypatch):
    """A terabyte that exists on paper alone: reading any of it would fail at once."""
    size = 2**40
    entry = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    sparse(tmp_path / "weights", entry, size)
    with pytest.raises(CertificateFileError, match="not a certificate"):
        Certificate.load(tmp_path / "weights")
    ours = {"format": files.FORMAT, "manifest": "{}", "sha256": "0" * 64}
    sparse(tmp_path / "promises", entry, 10, ours)
    with pytest.raises(CertificateFileError, match="cut short or damaged"):
        Certificate.load(tmp_path / "promises")


@pytest.mark.parametrize("offsets", [[0, -1], [0, True], [0, "8"], [0], None, [0, 1e3]])
def test_offsets_that_are_none(tmp_path, offsets):
    entry = {"w": {"dtype": "U8", "shape": [8], "data_offsets": offsets}}
    sparse(tmp_path / "f", entry, 8, {"format": files.FORMAT, "manifest": "{}", "sha256": "0" * 64})
    with pytest.raises(CertificateFileError):
        Certificate.load(tmp_path / "f")


def test_more_samples_than_counts_can_hold(saved):
    samples = torch.tensor([2**62, 512])
    rewritten(saved, {"samples": samples}, {"intervals": [[[0, 2**62]], [[0, 512]]]})
    with pytest.raises(CertificateFileError):
        Certificate.load(saved)
