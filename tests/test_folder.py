"""The folder of a run: whose files are touched, what several runs leave of each other, and what it costs."""

import csv
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import _cli_models
import numpy as np
import pytest
import torch
from _photos import write_photos
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from robattr_fast import Certificate, CertificateFileError, files
from robattr_fast.cli.app import app
from robattr_fast.jobs import job, results
from robattr_fast.jobs.folder import Folder
from robattr_fast.jobs.options import Options
from robattr_fast.jobs.record import JOURNAL, Record, Records
from robattr_fast.jobs.verification import verify_files
from robattr_fast.report import picture

OPTIONS = Options(samples=64, batch_size=16, radius=[0.001])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos", 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(picture, "certificate_figure", plain_figure)
    return tmp_path


def plain_figure(image, cert, *, k, radii, title):
    """As quick as pictures can be."""
    return Figure(figsize=(1, 1))


def certify(*paths, model="tiny", out="out", options=OPTIONS, fresh=False):
    """The results, and what was said."""
    said = []
    done = job.certify_folder(
        paths or ["photos"],
        f"_cli_models:{model}",
        out,
        options,
        fresh=fresh,
        say=lambda kind, message: said.append(f"{kind}: {message}"),
    )
    return done, said


def table(out="out"):
    with open(Path(out) / "certificates.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def manifest(out="out"):
    return json.loads((Path(out) / "manifest.json").read_text())


def everything(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def test_a_folder_is_certified_and_verified_from_python(folder):
    done, said = certify()
    assert [row.name for row in done.rows] == ["photo0", "photo1", "photo2"]
    assert (done.failures, done.interrupted, said) == ([], False, [])
    verified = list(verify_files(sorted(Path("out").glob("*.safetensors"))))
    assert [one.verdict for one in verified] == ["ok"] * 3
    assert all(one.record.row["samples"] == "64" for one in verified)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b'{"name": "my web app"}'),
        ("manifest.json", b"{"),
        ("certificates.tsv", b"host\tfingerprint\na\tb\n"),
        ("photo0.safetensors", b'\x10\0\0\0\0\0\0\0{"weight":[1,2]}'),
        ("photo0.checkpoint", b"of a training"),
    ],
)
def test_files_of_other_programs_are_refused_before_anything_is_loaded(folder, monkeypatch, name, content):
    monkeypatch.setattr(job.specs, "load", lambda *_, **__: pytest.fail("loaded"))
    Path("out").mkdir()
    (Path("out") / name).write_bytes(content)
    with pytest.raises((ValueError, CertificateFileError), match=name):
        certify()
    assert everything("out") == {name: content}


def test_a_photograph_that_is_no_picture_of_ours_is_not_replaced(folder):
    Path("out").mkdir()
    shutil.copy("photos/photo1.png", "out/photo0.png")
    before = everything("out")
    with pytest.raises(ValueError, match=r"photo0\.png is not of a run"):
        certify("photos/photo0.png")
    assert everything("out") == before


def test_what_killed_writers_left_goes_and_what_others_left_stays(folder):
    Path("out").mkdir()
    others = [".notes.abcdefgh.tmp", ".notes.0123abcd.tmp", ".photo0.png.swp", "photo0.txt", ".x.claim"]
    ours = [".photo0.png.0123abcd.tmp", ".manifest.json.01234567.tmp", ".photo1.safetensors.deadbeef.tmp"]
    for name in others + ours:
        (Path("out") / name).write_text("x")
    certify()
    left = set(everything("out"))
    assert left >= set(others)
    assert not left & set(ours)


def test_another_command_keeps_rows_and_entries_of_the_first(folder):
    certify("photos/photo2.png", "photos/photo0.png")
    first = table()
    certify("photos/photo1.png", options=dataclasses.replace(OPTIONS, radius=[0.5], seed=3))
    assert [row["name"] for row in table()] == ["photo2", "photo0", "photo1"]
    assert [{name: row[name] for name in first[0]} for row in table()[:2]] == first
    assert (table()[2]["overlap@0.001"], table()[0]["overlap@0.5"]) == ("", "")
    said = manifest()
    assert [image["name"] for image in said["images"]] == ["photo2", "photo0", "photo1"]
    assert said["settings"]["seed"] == 3
    (earlier,) = said["runs"].values()
    assert earlier["settings"]["seed"] == 0
    assert CliRunner().invoke(app, ["verify", "out"]).exit_code == 0

    # The first command again has nothing to do, and says nothing else.
    before = everything("out")
    done, said = certify("photos/photo2.png", "photos/photo0.png")
    assert (len(done.rows), said) == (2, [])
    assert everything("out") == before


def test_a_finished_folder_is_left_as_it_is(folder):
    certify(model="counting")
    before, sampled = everything("out"), _cli_models.passes()
    times = {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    certify(model="counting")
    assert _cli_models.passes() < 10 < sampled  # a few, for what the model does with images of this shape
    assert everything("out") == before
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()} == times


def test_a_photograph_of_the_same_name_does_not_replace_a_certificate(folder):
    certify("photos/photo0.png")
    Path("more").mkdir()
    shutil.copy("photos/photo1.png", "more/photo0.png")
    before = Certificate.load("out/photo0.safetensors").settings.input_hashes
    done, said = certify("more/photo0.png", "photos/photo1.png")
    assert [row.name for row in done.rows] == ["photo1"]
    assert "is of photos/photo0.png and would be replaced" in said[0]
    assert Certificate.load("out/photo0.safetensors").settings.input_hashes == before
    assert [row["name"] for row in table()] == ["photo0", "photo1"]
    certify("more/photo0.png", fresh=True)
    assert Certificate.load("out/photo0.safetensors").settings.input_hashes != before
    # Moved, but the same: nothing is to be done.
    os.rename("more", "moved")
    _, said = certify("moved/photo0.png")
    assert said == []


def test_results_beside_the_photographs(folder):
    for path in Path("photos").iterdir():
        Image.open(path).convert("RGB").save(path.with_suffix(".jpg"))
        path.unlink()
    first, _ = certify(out="photos")
    second, said = certify(out="photos")
    assert len(first.rows) == len(second.rows) == 3
    assert "drawn by certify photo0.png, photo1.png, photo2.png" in said[0]


def test_what_a_folder_of_photographs_holds_besides_is_named(folder):
    Path("photos/._photo0.png").write_bytes(bytes(4096))
    Path("photos/sub").mkdir()
    Path("photos/notes.txt").write_text("x")
    done, said = certify()
    assert len(done.rows) == 3
    assert said == ["note: photos: passed over hidden ._photo0.png; no image notes.txt; the folder sub"]
    shutil.copy("out/photo0.safetensors", "out/._photo0.safetensors")
    result = CliRunner().invoke(app, ["verify", "out"])
    assert result.exit_code == 0
    assert "passed over out/._photo0.safetensors" in result.stderr


def test_two_runs_at_a_time(folder):
    """Of other images they write into one folder; of the same they do not."""
    with Folder(Path("out"), ["photo0", "elsewhere"]):
        certify("photos/photo1.png", "photos/photo2.png")
        with pytest.raises(ValueError, match="another run is writing photo0 into out"):
            certify()
    certify()
    assert [row["name"] for row in table()] == ["photo0", "photo1", "photo2"]
    assert not [name for name in everything("out") if name.startswith(".")]


def row_of(name, index=0):
    counts = torch.zeros(1, 36, 1, dtype=torch.int32)
    votes = torch.tensor([[50, 14]], dtype=torch.int32)
    cert = Certificate.from_counts(counts, 64, sigma=0.2, class_counts=votes)
    row = results.Row.of(cert, results.label(cert, None), 7, [0.01], name=name, source=f"p/{name}", values=36)
    row.index = index
    return row, results.entry(row, cert)


SETTINGS = {"radius": [0.01], "k": 0.2}


def test_lines_of_two_runs_in_turns(tmp_path):
    """Each finds out that the other has ended, or has other columns."""
    runs = [results.describe({**SETTINGS, "seed": seed}, "model", torch.device("cpu")) for seed in (0, 1)]
    with Folder(tmp_path, ["a", "b"]) as first, Folder(tmp_path, ["c", "d"]) as second:
        for name, folder, run in (("a", first, 0), ("c", second, 1), ("b", first, 0)):
            row, entry = row_of(name)
            folder.add(runs[run], entry, row.tsv([0.01]))
        first.settle(runs[0], ["a", "b"])
        row, entry = row_of("d")
        second.add(runs[1], entry, {**row.tsv([0.01]), "overlap@0.5": 0.25})
        second.settle(runs[1], ["c", "d"])
    held = Records(tmp_path)
    assert not held.going_on
    assert list(held.images) == list(held.rows) == ["a", "b", "c", "d"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 1)):
        assert held.of(tmp_path / f"{name}.safetensors").settings["seed"] == seed
    assert [held.rows[name]["overlap@0.5"] for name in "abcd"] == ["", "", "", "0.25"]


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_a_killed_run_leaves_lines_that_are_read(tmp_path, torn):
    """With the last line of journal and table cut short, or whole."""
    run = results.describe(SETTINGS, "model", torch.device("cpu"))
    with Folder(tmp_path, ["a", "b"]) as folder:
        for name in ("a", "b"):
            row, entry = row_of(name)
            folder.add(run, entry, row.tsv([0.01]))
    for name in (JOURNAL, "certificates.tsv"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: -torn or None])
    held = Records(tmp_path)
    whole = {0: ["a", "b"], 1: ["a", "b"], 30: ["a"]}[torn]
    assert list(held.images) == whole
    assert held.of(tmp_path / "a.safetensors").settings == SETTINGS
    with Folder(tmp_path, ["a", "b"]) as folder:
        for name in ("b", "b"):
            row, entry = row_of(name)
            folder.add(run, entry, row.tsv([0.01]))
        folder.settle(run, ["a", "b"])
    held = Records(tmp_path)
    assert (list(held.images), list(held.rows), held.going_on) == (["a", "b"], ["a", "b"], False)


def test_bookkeeping_is_linear_in_images(tmp_path):
    """Of 4000 images one costs what it costs of 400, and less than a millisecond, of this process's time."""
    spent = {}
    run = results.describe(SETTINGS, "model", torch.device("cpu"))
    row, _ = row_of("x")
    for count in (400, 4000):
        names = [f"image{index}" for index in range(count)]
        start = time.process_time()
        with Folder(tmp_path / str(count), names) as folder:
            kept = results.Results(folder, SETTINGS, run)
            for index, name in enumerate(names):
                one = dataclasses.replace(row, name=name, index=index)
                entry = {"name": name, "files": [f"{name}.safetensors"], "seconds": 0.0}
                kept.add(one, entry, Record())
            kept.settle(names)
        held = Records(tmp_path / str(count))
        assert all(held.of(tmp_path / str(count) / f"{name}.safetensors").row for name in names)
        spent[count] = (time.process_time() - start) / count
    assert spent[4000] < max(3 * spent[400], 1e-3)
    assert spent[4000] < 1e-3


def test_folders_of_before_are_read_resumed_and_verified(folder):
    """Without journal, runs and the newer columns."""
    certify(model="counting")
    rows = table()
    old = [name for name in rows[0] if name not in ("values", "model_class", "model_class_name")]
    with open("out/certificates.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, old, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert CliRunner().invoke(app, ["verify", "out"]).exit_code == 0
    assert certify(model="counting")[1] == []
    assert _cli_models.passes() < 10
    assert [{name: row[name] for name in old} for row in table()] == [{name: row[name] for name in old} for row in rows]


def test_the_first_image_may_fail_like_any_other(folder):
    """Too small for the model: known only once the model has it."""
    Image.new("RGB", (9, 9)).save("photos/a.png")
    Image.new("RGB", (1, 1)).save("photos/b.png")
    Path("photos/c.png").write_bytes(b"")
    done, said = certify(model="fixed_size")
    assert [row.name for row in done.rows] == ["photo0", "photo1", "photo2"]
    assert sorted(failure["name"] for failure in done.failures) == ["a", "b", "c"]
    assert sorted(failure["name"] for failure in manifest()["failures"]) == ["a", "b", "c"]
    for name, message in zip("abc", sorted(said), strict=True):
        reason = "not an image" if name == "c" else "model: its forward failed"
        assert message.startswith(f"error: photos/{name}.png: {reason}")


def test_a_failure_that_is_over_is_forgotten(folder):
    whole = Path("photos/photo1.png").read_bytes()
    Path("photos/photo1.png").write_bytes(whole[:50])
    done, _ = certify()
    assert len(done.failures) == len(manifest()["failures"]) == 1
    Path("photos/photo1.png").write_bytes(whole)
    certify()
    assert manifest()["failures"] == []
    assert [row["name"] for row in table()] == ["photo0", "photo1", "photo2"]


def test_a_picture_that_fails_costs_no_certificate(folder, monkeypatch):
    draw = picture.certificate_figure

    def broken(image, cert, *, title, **options):
        if "photo0" in title:
            raise RuntimeError("no such glyph")
        return draw(image, cert, title=title, **options)

    monkeypatch.setattr(picture, "certificate_figure", broken)
    done, said = certify()
    assert len(done.rows) == 3
    assert said == [
        "error: photos/photo0.png: is certified, but its picture cannot be drawn: RuntimeError: no such glyph"
    ]
    assert "photo0.png" not in everything("out")
    monkeypatch.setattr(picture, "certificate_figure", draw)
    assert certify()[1] == []
    assert "photo0.png" in everything("out")


def test_a_disk_without_room_is_refused_before_the_first_sample(folder, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    _cli_models.counting()
    with pytest.raises(OSError, match=r"out: an image takes up to \d+ MiB there, 1 are free"):
        certify(model="counting")
    assert _cli_models.passes() == 0


def test_locked_folders_wait_for_each_other(tmp_path):
    """A child that appends under the lock while the parent holds it comes after."""
    path = tmp_path / "lines"
    read, write = os.pipe()
    with files.locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(write, b"x")
            with files.locked(tmp_path):
                files.append_line(path, "child")
            os._exit(0)
        os.read(read, 1)
        time.sleep(0.1)
        files.append_line(path, "parent")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_text() == "parent\nchild\n"
    with pytest.raises(ValueError, match="line"):
        files.append_line(path, "a\nb")


def test_names_that_leave_no_room_for_suffixes_are_cut(folder):
    rng = np.random.default_rng(3)
    for end in "ab":
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save("t.png")
        os.replace("t.png", f"photos/{'x' * 250}{end}.png")
    done, said = certify()
    assert said == []
    names = [row.name for row in done.rows if row.name.startswith("x")]
    assert len(set(names)) == 2
    assert all((Path("out") / f"{name}.safetensors").exists() for name in names)
    assert certify()[1] == []


def test_noisy_copies_of_another_class_are_told(folder):
    """A model that calls smooth images class 0 and rough ones class 1: noise makes every image rough."""
    Image.new("RGB", (12, 10), (128, 128, 128)).save("photos/plain.png")
    done, said = certify("photos/plain.png", model="roughness")
    (row,) = done.rows
    assert (row.own, row.label.number) == ((0, "0"), 1)
    assert said[0].startswith("warning: photos/plain.png: the model says class 0, most noisy copies class 1 (")
    assert (table()[0]["model_class"], table()[0]["class"]) == ("0", "1")
    assert done.rows[0].classes == "noisy copies say 1, the model says 0"
    shown = CliRunner().invoke(app, ["verify", "out"])
    assert shown.exit_code == 0
    assert "the model says class 0, most noisy copies class 1 (" in shown.stdout
    assert CliRunner().invoke(app, ["report", "out"]).exit_code == 0
    html = Path("report.html").read_text()
    assert "noisy copies say class 1 (1), " in html
    assert "; the model says 0" in html
    # Found again it is told again, and nothing is asked of the model.
    assert certify("photos/plain.png", model="roughness")[1] == said
    done, said = certify("photos/photo0.png")
    assert (done.rows[0].own[0], said) == (done.rows[0].label.number, [])


def test_nothing_certified_is_one_line_with_its_reason(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    fixed = ["certify", "photos", "--model", "_cli_models:tiny", "--batch-size", "16"]
    few = CliRunner().invoke(app, [*fixed, "--samples", "8", "--out", "few"])
    assert few.exit_code == 0
    assert "photo0: nothing certified at radius 0.01 or above: 8 samples are too few, whatever the map" in few.stdout
    assert "0.0 %" not in few.stdout
    far = CliRunner().invoke(app, [*fixed, "--samples", "512", "--radius", "0.5", "--out", "far"])
    assert (
        "photo0: nothing certified at radius 0.5 or above: the top set begins to be certified below radius"
        in far.stdout
    )
    near = CliRunner().invoke(app, ["verify", "far", "--radius", "0.5"])
    assert near.exit_code == 0
    assert "none" in near.stdout
    assert "nothing certified at radius 0.5 or above" in near.stdout


def test_a_top_set_of_a_number_of_elements(folder):
    done, _ = certify(options=dataclasses.replace(OPTIONS, k=50))
    assert {row.k for row in done.rows} == {50}
    assert manifest()["settings"]["k"] == 50
    assert done.rows[0].shares == [float(Certificate.load("out/photo0.safetensors").overlap(50, 0.001).share)]
    with pytest.raises(
        ValueError, match=r"k: got 181 of the 360 elements of a map, expected at most half of them, 180"
    ):
        certify(out="more", options=dataclasses.replace(OPTIONS, k=181))
    assert not list(Path("more").glob("*.safetensors"))
    for k in (0, 0.6, 1.5, -3, float("nan")):
        with pytest.raises(ValueError, match=f"k: got {k}"):
            dataclasses.replace(OPTIONS, k=k)
