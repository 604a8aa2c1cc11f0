"""File names, class names and error texts are data: no terminal, table or page acts on them, and none is lost."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from robattr_fast.cli.app import app
from robattr_fast.inputs import names
from robattr_fast.report import picture

HOSTILE = {
    "markup": "cat[final][bold red]",
    "link": "a[link=http:x]b[dim]",
    "ansi": "\x1b[2J\x1b]0;owned\x07",
    "line": "two\nlines\tand\rback",
    "html": "<script>alert(1)</script>&amp;\"'".replace("/", "\u2215"),
    "formula": r"a$_^$\frac{",
    "quotes": "\"quoted\", 'cell'",
    "bytes": os.fsdecode(b"caf\xe9"),
    "turned": "photo\u202egpj",
    "script": "写真 фото",
    "backslash": r"a\x1b\n",
    "escape": r"caf\udce9",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_escapes_are_whole_and_reversible(text):
    shown = names.printable(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)
    assert names.from_cell(names.cell(text)) == text
    assert len({names.cell(other) for other in HOSTILE.values()}) == len(HOSTILE)
    shown.encode()


def test_usual_names_are_shown_as_they_are():
    for text in ("写真 фото", "Bildschirmfoto 2024\u202f12.01", "a-b_c (1)", "👨\u200d👩\u200d👧"):
        assert names.printable(text) == text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of photographs with such names, certified; and what was printed."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name in HOSTILE.values():
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / "t.png")
        os.replace(folder / "t.png", folder / "photos" / f"{name}.png")
    (folder / "photos" / "\x1b[1mbroken[red].png").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        patch.setattr(picture, "certificate_figure", titled)
        fixed = ["--model", "_cli_models:tiny", "--samples", "64", "--batch-size", "16", "--radius", "0.001"]
        done = CliRunner().invoke(app, ["certify", "photos", *fixed])
    return folder, done


def titled(image, cert, *, k, radii, title):
    """The heading alone is drawn as `picture` draws it."""
    figure = Figure(figsize=(4, 1))
    picture.heading(figure, title)
    return figure


def quiet(text):
    """Nothing in it acts on a terminal."""
    return not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)


def test_every_name_is_certified_and_shown(run):
    folder, done = run
    assert done.exit_code == 1, done.output  # of the broken one
    assert quiet(done.stdout)
    assert quiet(done.stderr)
    assert "\\x1b[1mbroken[red].png: " in done.stderr
    lines = [line.split("  ")[0].rstrip() for line in done.stdout.splitlines()]
    for name in HOSTILE.values():
        assert (folder / "out" / f"{name}.safetensors").exists()
        assert (folder / "out" / f"{name}.png").exists()
        assert names.printable(name) in lines


def test_the_table_is_a_text_of_one_line_each(run):
    folder, _ = run
    text = (folder / "out" / "certificates.tsv").read_text(encoding="utf-8")
    assert quiet(text)
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    assert {names.from_cell(row["name"]) for row in rows} == set(HOSTILE.values())
    assert quiet((folder / "out" / "manifest.json").read_text(encoding="ascii"))


def test_verify_and_report_show_them_too(run, monkeypatch):
    folder, _ = run
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "250")
    done = CliRunner().invoke(app, ["verify", "out"])
    assert done.exit_code == 0, done.output
    assert quiet(done.output)
    table = Path("out/certificates.tsv")
    whole = table.read_text()
    evil = r"<img src=x onerror=alert(1)> [red]\x1b[2J"
    header, first, *rest = whole.splitlines()
    column = header.split("\t").index("class_name")
    cells = first.split("\t")
    cells[column] = evil
    table.write_text("\n".join([header, "\t".join(cells), *rest]) + "\n")
    broken = Path("out") / "\x1b]0;[bold]x.safetensors"
    broken.write_bytes(b"\x1b[2J[red]")
    try:
        failed = CliRunner().invoke(app, ["verify", "out"])
        page = CliRunner().invoke(app, ["report", "out"])
    finally:
        broken.unlink()
        table.write_text(whole)
    assert failed.exit_code == page.exit_code == 1
    assert quiet(failed.output)
    assert quiet(page.output)
    assert names.printable(str(broken)) in page.stderr
    html = Path("report.html").read_text(encoding="utf-8")
    assert quiet(html)
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror" in html
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert names.printable(HOSTILE["bytes"]) in html


@pytest.mark.slow
def test_as_a_process_that_writes_to_a_terminal_of_bytes(run):
    """Names that are no UTF-8, through the interpreter's own streams."""
    folder, _ = run
    command = [sys.executable, "-m", "robattr_fast", "verify", "out"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
