"""The table of familiar changes in docs/certificates.md is the one that its command prints."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("PIL")
pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("familiar_changes", ROOT / "examples" / "familiar_changes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_is_measured(example):
    rows = {}
    for line in (ROOT / "docs" / "certificates.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in example.CHANGES:
            rows[cells[0]] = float(cells[1])
    # Decoders of JPEG differ by a rounding; the page has three digits.
    assert rows == pytest.approx(example.measured(), rel=0.02)


def test_grey_levels_are_exact(example):
    found = example.measured()
    assert found["234 values by one grey level"] == pytest.approx(234**0.5 / 255, rel=1e-9)
    assert example.grey_levels(found["one value by one grey level"]) == 1
    assert "| every value by one grey level (brightness) | 1.52 | 150 528 |" in example.table()
