"""``robattr-fast verify``: what passes, what fails and how it says so."""

import csv
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import _cli_models
import pytest
import torch
from _photos import write_photos
from typer.testing import CliRunner

from robattr_fast import Certificate, certify
from robattr_fast.certificates.certificate import files
from robattr_fast.cli.app import app
from robattr_fast.inputs import images, specs
from robattr_fast.report import rounding

# One process makes the run that the tests damage.
pytestmark = pytest.mark.xdist_group("verify")


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def verify(*arguments):
    return command("verify", *arguments)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run of two photographs, with second moments."""
    folder = tmp_path_factory.mktemp("run")
    write_photos(folder / "photos", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = command(
            *("certify", "photos", "--model", "_cli_models:tiny", "--samples", 512, "--batch-size", 8, "--k", 0.1)
        )
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def run(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def rewritten(name="out/photo0.safetensors", **changes):
    """The certificate with other tensors or settings, its checksum right."""
    cert = Certificate.load(name)
    tensors = {key: changes.pop(key) for key in list(changes) if key in cert.tensors}
    changed = Certificate(**{**cert.tensors, **tensors}, settings=dataclasses.replace(cert.settings, **changes))
    changed.save(name)
    return changed


def failed(result, message):
    assert result.exit_code == 1, result.output
    assert message in result.stderr, result.stderr
    assert all(line.startswith("error: ") for line in result.stderr.strip().splitlines())
    assert "failed" in result.stdout


def test_a_run_verifies(run):
    result = verify("out", "--k", 0.1, "--k", 0.3, "--radius", 0.002, "--overlap", 0.25)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for index in range(2):
        cert = Certificate.load(f"out/photo{index}.safetensors")
        lines = [line for line in result.stdout.splitlines() if line.startswith(f"photo{index}")]
        assert len(lines) == 2
        for line, k in zip(lines, (36, 108), strict=True):
            assert rounding.percent(float(cert.overlap(k, 0.002).share)) in line
            assert rounding.radius(float(cert.radius(k, 0.25))) in line
            assert line.rstrip().endswith("ok")


def test_on_another_checkout(run):
    """A certificate alone, without table, manifest, image or model."""
    Path("elsewhere").mkdir()
    shutil.copy("out/photo0.safetensors", "elsewhere/x.safetensors")
    assert verify("elsewhere").exit_code == 0
    assert verify("elsewhere/x.safetensors", "out/photo1.safetensors").exit_code == 0


def test_damage_is_found_and_the_other_files_are_checked(run):
    path = Path("out/photo0.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    result = verify("out")
    failed(result, "photo0.safetensors: checksum does not match")
    assert next(line for line in result.stdout.splitlines() if line.startswith("photo1")).rstrip().endswith("ok")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("overlap@0.01", "0.9"),
        ("cosine@0.01", "0.99999"),
        ("method@0.01", "magic"),
        ("label_radius", "1.5"),
        ("class", "4"),
        ("samples", "8192"),
        ("k", "35"),
        ("k", "many"),
        ("sigma", "0.25"),
        ("bound", "kl"),
        ("image_id", "7"),
    ],
)
def test_a_table_that_says_something_else(run, column, value):
    with open("out/certificates.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert rows[0][column] != value
    rows[0][column] = value
    with open("out/certificates.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    result = verify("out")
    failed(result, "photo0.safetensors: certificates.tsv")
    assert "photo1" not in result.stderr


@pytest.mark.parametrize("key", ["input_hash", "image_id", "batch_size", "model_fingerprint"])
def test_a_manifest_that_says_something_else(run, key):
    manifest = json.loads(Path("out/manifest.json").read_text())
    (manifest if key == "model_fingerprint" else manifest["images"][1])[key] = "another"
    Path("out/manifest.json").write_text(json.dumps(manifest))
    failed(verify("out"), f"photo1.safetensors: manifest.json says {key} another, the file ")


@pytest.mark.parametrize("text", ["{", "[]", '{"images": 3}', '{"images": [{"files": 3}]}', '{"settings": []}'])
def test_a_manifest_that_is_none(run, text):
    Path("out/manifest.json").write_text(text)
    failed(verify("out"), "manifest.json: ")


def test_a_table_that_is_none(run):
    Path("out/certificates.tsv").write_text("name\tk\nphoto0\nphoto1\t3\t4\n")
    failed(verify("out"), "certificates.tsv: its rows differ in length")


def test_more_selections_than_samples_can_make(run):
    """Each sample selects k_tau elements at most: one element more, and the counts are not of these samples."""
    Path("alone").mkdir()
    shutil.move("out/photo0.safetensors", "alone/photo0.safetensors")
    counts = Certificate.load("alone/photo0.safetensors").counts
    assert int(counts.sum()) == 512 * 36
    counts[0, int(counts[0, :, 0].argmin()), 0] += 1
    rewritten("alone/photo0.safetensors", counts=counts)
    failed(verify("alone"), "counts: image 0 has 18433 selections, its samples have at most 18432")


@pytest.fixture(scope="module")
def kept():
    """A certificate that holds its samples, fewer of them than were drawn."""
    x = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    settings = {"sigma": 0.2, "samples": 65, "batch_size": 8, "retain": 32}
    return certify(_cli_models.tiny(), x, **settings, keep_samples=True)


def test_kept_samples(run, kept):
    kept.save("kept.safetensors")
    assert verify("kept.safetensors").exit_code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cert: cert.packed[0, 5].bitwise_not_(), "other second moments than its packed samples"),
        (lambda cert: cert.gram_summary[0, 3].mul_(1 + 1e-5), "other second moments than its packed samples"),
        (lambda cert: cert.directions[0, 1].neg_(), "other second moments than its packed samples"),
        (lambda cert: cert.packed[0, :, :].copy_(cert.packed[0].roll(1, 1)), "counts that its packed samples exclude"),
        (
            lambda cert: cert.counts[0, :, 0].copy_(cert.counts[0, :, 0].flip(0)),
            "counts that its packed samples exclude",
        ),
    ],
)
def test_kept_samples_that_contradict_the_file(run, kept, change, message):
    cert = Certificate(**{name: one.clone() for name, one in kept.tensors.items()}, settings=kept.settings)
    change(cert)
    cert.save("kept.safetensors")
    failed(verify("kept.safetensors"), message)


def test_remarks(run):
    cert = Certificate.load("out/photo0.safetensors")
    cert.with_bounds(alpha=0.5).save("explored.safetensors")
    none = torch.zeros_like(cert.gram_summary)  # what a run that ends off its looks has
    rewritten(planned_samples=(1000,), bound="kl", slack=0, gram_summary=none)
    shutil.move("out/photo0.safetensors", "ended.safetensors")
    result = verify("explored.safetensors", "ended.safetensors")
    assert result.exit_code == 0, result.output
    assert "explored.safetensors: bound, slack or alpha were chosen after the fact" in result.stdout
    assert "ended.safetensors: kl holds for [1000] samples as planned" in result.stdout


@pytest.mark.parametrize("count", ["all", "20", None])
def test_replay(run, count):
    options = [] if count is None else ["--replay", count]
    result = verify("out", "--model", "_cli_models:tiny", *options)
    assert result.exit_code == 0, result.output
    said = "all 512 samples replayed: the counts are theirs, exactly" if count == "all" else "of 512 samples replayed"
    assert said in next(line for line in result.stdout.splitlines() if line.startswith("photo0.safetensors, photo1."))


def test_replay_finds_another_model_image_and_count(run):
    failed(verify("out", "--model", "_cli_models:other"), "the model is another one")
    one = ["out/photo0.safetensors", "--model", "_cli_models:tiny"]
    failed(verify(*one, "--image", "photos/photo1.png"), "the image is another one")
    assert verify(*one, "--image", "photos/photo0.png").exit_code == 0
    shutil.move("photos/photo0.png", "away.png")
    result = verify(*one)
    assert result.exit_code == 1
    assert "its image was not found at photos/photo0.png: name it with --image" in result.stderr
    assert "not replayed" in result.stdout
    cert = Certificate.load("out/photo0.safetensors")
    counts = cert.counts.clone()
    often, seldom = int(counts[0, :, 0].argmax()), int(counts[0, :, 0].argmin())
    counts[0, often, 0] -= 1
    counts[0, seldom, 0] += 1
    rewritten(counts=counts)
    failed(verify(*one, "--image", "away.png"), "gram_summary of image 0 contradicts the counts")
    # Without second moments the samples alone tell.
    blank = {name: torch.zeros_like(cert.tensors[name]) for name in ("gram_summary", "directions")}
    Certificate(**{**cert.tensors, **blank, "counts": counts}, settings=cert.settings).save(one[0])
    result = verify(*one, "--image", "away.png", "--replay", "all")
    failed(result, "counts: 2 of 360 entries are not what all samples give, by up to 1")


def test_a_file_of_several_images(run):
    chosen = specs.load("_cli_models:tiny")
    x = torch.stack([images.read(Path(f"photos/photo{index}.png"), chosen.preprocess) for index in (0, 1)])
    certify(chosen.module, x, sigma=0.3, samples=64, batch_size=16).save("both.safetensors")
    arguments = ["both.safetensors", "--model", "_cli_models:tiny", "--replay", "all"]
    photos = [argument for index in (1, 0) for argument in ("--image", f"photos/photo{index}.png")]
    result = verify(*arguments, *photos)
    assert result.exit_code == 0, result.output
    for index in (0, 1):
        assert f"image {index} of 2: all 64 samples replayed: the counts agree" in result.stdout
    result = verify(*arguments, *photos[2:])
    assert result.exit_code == 1
    assert "image 1 of 2: its image was not found: name it with --image" in result.stderr
    assert "not replayed" in result.stdout
    assert "failed" not in result.stdout


def test_smoothing_log(run):
    Path("labels.txt").write_text("photo0 3\n\nphoto1\t2\n")
    assert verify("out", "--tsv", "log.tsv", "--labels", "labels.txt").exit_code == 0
    with open("log.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["idx", "label", "predict", "radius", "correct", "time"]
    for index, (row, truth) in enumerate(zip(rows, (3, 2), strict=True)):
        prediction = Certificate.load(f"out/photo{index}.safetensors").prediction()
        assert (int(row["idx"]), int(row["label"])) == (index, truth)
        assert int(row["predict"]) == int(prediction.label)
        assert float(row["radius"]) == float(prediction.radius)
        assert int(row["correct"]) == (int(prediction.label) == truth)
        assert row["time"].startswith("0:00:")
    assert verify("out", "--tsv", "log.tsv").exit_code == 0
    with open("log.tsv", newline="") as file:
        assert [(row["label"], row["correct"]) for row in csv.DictReader(file, delimiter="\t")] == [("", "")] * 2


def test_abstaining_in_the_log(run):
    votes = torch.full((1, 5), 100, dtype=torch.int32)
    rewritten(class_counts=votes)
    shutil.move("out/photo0.safetensors", "tie.safetensors")
    assert verify("tie.safetensors", "--tsv", "log.tsv").exit_code == 0
    assert Path("log.tsv").read_text().splitlines()[1].split("\t") == ["0", "", "-1", "0.0", "", ""]


def test_several_images_in_one_file(run):
    counts = torch.zeros(2, 20, 1, dtype=torch.int32)
    counts[:, :4] = 200
    Certificate.from_counts(counts, 200, sigma=0.5).save("two.safetensors")
    result = verify("two.safetensors")
    assert result.exit_code == 0, result.output
    assert [line.split("  ")[0] for line in result.stdout.splitlines() if line.startswith("two")] == [
        "two [0]",
        "two [1]",
    ]


TAMPERED = {
    "tau of text": {"tau": "x"},
    "tau of 3": {"tau": 3},
    "tau without end": {"tau": 1e999},
    "sigma of 2^70": {"sigma": 2**70},
    "plan of an object": {"planned_samples": {"a": 1}},
    "half a slack": {"slack": 1.5},
    "no retain": {"retain": None},
    "samples of 2^62": {"samples": torch.tensor([2**62]), "intervals": [[[0, 2**62]]]},
    "moments of 1e300": {"gram_summary": torch.full((1, 16), 1e300, dtype=torch.float64)},
}


@pytest.mark.parametrize("changes", TAMPERED.values(), ids=TAMPERED)
def test_whatever_is_in_a_file_the_others_are_checked(run, monkeypatch, changes):
    """Its checksum is right."""
    tensors, settings = files.load("out/photo0.safetensors")
    dumps = json.dumps
    changed = {name: value for name, value in changes.items() if name in tensors}
    rest = {name: value for name, value in changes.items() if name not in tensors}
    with monkeypatch.context() as patch:
        patch.setattr(files.json, "dumps", lambda value, **options: dumps(value, **{**options, "allow_nan": True}))
        files.save("out/bad.safetensors", {**tensors, **changed}, {**settings, **rest})
    result = verify("out")
    assert result.exit_code in (0, 1), result.output
    verdicts = {line.split()[0]: line.split()[-1] for line in result.stdout.splitlines() if line}
    assert verdicts["photo0"] == verdicts["photo1"] == "ok"
    assert result.exit_code == (verdicts["bad"] != "ok")


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        ({"radius": ["x"]}, "name\tk\toverlap@0.01\nphoto0\t36\t0.1\n"),
        ({"radius": 5}, "name\tk\toverlap@y\nphoto0\t36\t0.1\n"),
        ({}, "name\tk\nphoto0\t36\n"),
        ({}, "name\tk\nphoto0\t-7\n"),
    ],
)
def test_whatever_lies_beside_a_file_it_is_checked(run, settings, table):
    entry = {"name": "photo0", "files": ["photo0.safetensors"], "seconds": 1e300, "source": "\0"}
    Path("out/manifest.json").write_text(json.dumps({"settings": settings, "images": [entry]}))
    Path("out/certificates.tsv").write_text(table)
    result = verify("out", "--tsv", "log.tsv")
    assert result.exit_code == 1
    assert "photo0.safetensors: certificates.tsv" in result.stderr
    assert next(line for line in result.stdout.splitlines() if line.startswith("photo1")).rstrip().endswith("ok")


def test_a_manifest_of_another_program_is_not_compared(run):
    Path("out/manifest.json").write_text('{"name": "my web app"}')
    Path("out/certificates.tsv").unlink()
    result = verify("out")
    assert result.exit_code == 0
    assert "manifest.json beside it is of another program and was not compared" in result.stdout


@pytest.mark.parametrize("columns", [80, 40])
def test_no_number_is_broken_over_lines(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    result = verify("out", "--k", 0.1, "--k", 50)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()[:8])) <= columns
    cert = Certificate.load("out/photo0.safetensors")
    for k in (36, 50):
        for radius in (0.01, 0.03, 0.06):
            assert rounding.percent(float(cert.overlap(k, radius).share)) in result.stdout
        assert rounding.radius(float(cert.radius(k, 0.5))) in result.stdout
    assert re.search(r"\b512\b", result.stdout)


def test_a_size_that_a_map_has_not(run):
    result = verify("out", "--k", 181)
    assert result.exit_code == 1
    assert "k: got 181 of the 360 elements" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.safetensors"], "nothing.safetensors: no such file"),
        (["photos"], "photos: no certificate here"),
        (["out", "--k", 0.6], "k: got 0.6"),
        (["out", "--radius", -1], "radius: got -1"),
        (["out", "--overlap", 0], "overlap: got 0"),
        (["out", "--replay", 5], "replay: got it without --model"),
        (["out", "--model", "_cli_models:tiny", "--replay", "some"], "replay: got 'some'"),
        (["out", "--model", "_cli_models:tiny", "--replay", 0], "replay: got 0"),
        (["out", "--model", "_cli_models:tiny", "--image", "photos/photo0.png"], "image: got one for 2"),
        (["out", "--image", "photos/photo0.png"], "image: got one without --model"),
        (["out", "--labels", "labels.txt"], "labels: got them without --tsv"),
        (["out", "--tsv", "x", "--labels", "photos/photo0.png"], "labels"),
        (["out", "--tsv", "x", "--labels", "bad.txt"], "bad.txt, line 1: got 'photo0 cat'"),
        (["out", "--tsv", "no/such/folder"], "no/such"),
        (["out", "--device", "tpu"], "device: got 'tpu'"),
        (["out", "--threads", 0], "threads: got 0"),
    ],
)
def test_bad_usage(run, arguments, message):
    Path("bad.txt").write_text("photo0 cat\n")
    result = verify(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_nothing_of_the_model_is_loaded_without_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "_cli_models", None)
    assert verify("out").exit_code == 0
