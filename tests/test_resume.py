"""`certify` on folders that is killed, ended or starved of disk space: nothing is lost, nothing is sampled twice."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import _cli_models
import pytest
from _larger import larger
from _photos import write_photos
from matplotlib.figure import Figure
from typer.testing import CliRunner

import robattr_fast
from robattr_fast import Certificate
from robattr_fast.certificates.engine import run
from robattr_fast.cli.app import app
from robattr_fast.report import picture

pytestmark = pytest.mark.once

IMAGES = 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a folder of photographs; checkpoints are written after every batch."""
    write_photos(tmp_path / "photos", IMAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(picture, "certificate_figure", plain_figure)
    return tmp_path


def plain_figure(image, cert, *, k, radii, title):
    """As quick as pictures can be, and as different as they have to be."""
    figure = Figure(figsize=(4, 1))
    figure.text(0, 0.5, f"{title} {k} {radii} {float(image.sum())} {int(cert.counts.sum())}")
    return figure


def certify(*options, model="tiny", samples=80, out="out"):
    fixed = ["--model", f"_cli_models:{model}", "--samples", str(samples), "--batch-size", "8", "--out", out]
    return CliRunner().invoke(app, ["certify", "photos", *fixed, *map(str, options)])


def names(out="out"):
    return sorted(path.name for path in Path(out).iterdir())


def contents(out):
    """Everything in a folder but for what took how long."""
    found = {path.name: path.read_bytes() for path in Path(out).iterdir() if path.suffix in (".png", ".safetensors")}
    manifest = json.loads((Path(out) / "manifest.json").read_text())
    for image in manifest["images"]:
        image.pop("seconds")
    with open(Path(out) / "certificates.tsv", newline="") as file:
        rows = [{**row, "seconds": ""} for row in csv.DictReader(file, delimiter="\t")]
    return found, manifest, rows, names(out)


KILLED = textwrap.dedent("""
    # Imports once, then forks a run of the command again and again and kills it at random times.
    import contextlib, os, random, shutil, signal, sys, time
    import matplotlib.backends.backend_agg, matplotlib.figure, PIL.Image, scipy.stats, torch
    from robattr_fast.certificates.engine import run
    from robattr_fast.report import picture
    from robattr_fast.cli.app import app

    most = int(sys.argv.pop(1))
    if sys.argv.pop(1) == "plain":
        from test_resume import plain_figure
        picture.certificate_figure = plain_figure
    PIL.Image.init()
    with contextlib.suppress(SystemExit):
        app(["certify", "--help"])

    def start():
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run.CHECKPOINT_SECONDS = 0.0
            try:
                app(sys.argv[1:], prog_name="robattr-fast")
            except SystemExit as end:
                os._exit(end.code or 0)  # taking the interpreter down takes longer than the run
        return child

    clock = random.Random(0)
    os.waitpid(start(), 0)
    os.rename("out", "uninterrupted")
    began = time.monotonic()
    os.waitpid(start(), 0)
    whole = time.monotonic() - began
    shutil.rmtree("out")
    kills = 0
    while True:
        child = start()
        time.sleep(clock.uniform(0.02, 0.25) * whole)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            break
        kills += 1
        if kills == most:
            status = os.waitpid(start(), 0)[1]
            break
    print()
    print(kills, os.waitstatus_to_exitcode(status))
    """)


@pytest.mark.parametrize(("samples", "most", "pictures"), [(40, 3, "plain"), *larger((600, 12, "whole"))])
def test_killed_at_random_times(folder, samples, most, pictures):
    command = ["certify", "photos", "--model", "_cli_models:tiny", "--samples", str(samples), "--batch-size", "4"]
    search = os.pathsep.join([str(Path(__file__).parent), str(Path(robattr_fast.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(most), pictures, *command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills, status = map(int, done.stdout.splitlines()[-1].split())
    assert status == 0, done.stderr
    assert kills >= 3
    assert contents("out") == contents("uninterrupted")


@pytest.mark.parametrize("model", ["terminated", "interrupted"])
def test_a_signal_leaves_files_that_can_be_used_and_resumed(folder, model):
    result = certify(model=model)
    assert result.exit_code == 130, result.output
    partial = Certificate.load("out/photo0.safetensors")
    assert 0 < int(partial.samples[0]) < 80
    assert names() == ["certificates.tsv", "manifest.json", "photo0.checkpoint", "photo0.png", "photo0.safetensors"]
    assert CliRunner().invoke(app, ["verify", "out"]).exit_code == 0

    # Two classes of the same module: what is printed of it, and hence its fingerprint, is the same.
    assert certify(model="counting").exit_code == 0
    assert certify(model="counting", out="whole").exit_code == 0
    ours, theirs = contents("out"), contents("whole")
    assert ours[0] == theirs[0]
    assert ours[2:] == theirs[2:]


def test_finished_images_are_not_sampled_again(folder):
    assert certify(model="counting").exit_code == 0
    before, sampled = contents("out"), _cli_models.passes()
    assert certify(model="counting").exit_code == 0
    assert _cli_models.passes() < 10 < sampled  # a few, for what the model does with images of this shape
    assert contents("out") == before
    assert certify("--fresh", model="counting").exit_code == 0
    assert _cli_models.passes() == sampled
    assert contents("out") == before


@pytest.mark.parametrize(
    "change",
    [
        ["--seed", 1],
        ["--channel-sum"],
        ["--keep-samples"],
        *larger(["--sigma", 0.3], ["--alpha", 0.1], ["--levels", 3], ["--target", 1]),
    ],
)
def test_other_settings_are_sampled(folder, change):
    assert certify(model="counting").exit_code == 0
    assert certify(*change, model="counting").exit_code == 0
    assert _cli_models.passes() > 0
    ours = contents("out")
    assert certify(*change, model="counting", out="whole").exit_code == 0
    assert ours == contents("whole")


def test_another_model_or_image_is_sampled(folder):
    assert certify().exit_code == 0
    first = [Certificate.load(f"out/photo{index}.safetensors") for index in range(IMAGES)]
    shutil.copy("photos/photo0.png", "photos/photo1.png")
    assert certify().exit_code == 0
    second = [Certificate.load(f"out/photo{index}.safetensors") for index in range(IMAGES)]
    changed = [
        ours.settings.input_hashes != theirs.settings.input_hashes for ours, theirs in zip(first, second, strict=True)
    ]
    assert changed == [False, True, False]
    assert certify(model="other").exit_code == 0
    assert Certificate.load("out/photo0.safetensors").settings.model_fingerprint != second[0].settings.model_fingerprint


def test_a_picture_is_drawn_again_where_it_would_look_otherwise(folder):
    assert certify("--k", 0.2).exit_code == 0
    before = contents("out")[0]
    assert certify("--k", 0.1).exit_code == 0
    after = contents("out")[0]
    for name in before:
        assert (before[name] == after[name]) == name.endswith(".safetensors")


def test_a_damaged_certificate_is_sampled_again(folder):
    assert certify().exit_code == 0
    before = contents("out")
    Path("out/photo1.safetensors").write_bytes(before[0]["photo1.safetensors"][:-1])
    assert certify().exit_code == 0
    assert contents("out") == before


def test_a_model_that_does_something_else_is_another_one(folder, monkeypatch):
    assert certify(model="surrounded").exit_code == 0
    before = {name: (folder / "out" / name).read_bytes() for name in names() if name.endswith(".safetensors")}
    again = certify(model="surrounded")
    assert again.exit_code == 0
    assert "of another run" not in again.stderr
    assert before == {name: (folder / "out" / name).read_bytes() for name in before}
    monkeypatch.setenv("ROBATTR_FAST_TEST_FACTOR", "-1")
    other = certify(model="surrounded")
    assert other.exit_code == 0
    assert other.stderr.count("is of another run (model_fingerprint): it is replaced") == len(before)


def test_a_checkpoint_of_another_run_is_not_overwritten(folder):
    assert certify(model="interrupted").exit_code == 130
    kept = Path("out/photo0.checkpoint").read_bytes()
    result = certify("--seed", 1, model="counting")
    assert result.exit_code == 2
    assert "photo0.checkpoint holds another run (differs in seed)" in result.stderr
    assert Path("out/photo0.checkpoint").read_bytes() == kept
    assert certify("--seed", 1, "--fresh", model="counting").exit_code == 0
    assert "photo0.checkpoint" not in names()


def test_full_disk(folder):
    """Files cannot grow beyond a size that pictures and certificates need: as on a full disk, writing fails."""
    os.rename("photos/photo2.png", "photo2.png")
    assert certify().exit_code == 0
    before = {name: (folder / "out" / name).read_bytes() for name in names()}
    os.rename("photo2.png", "photos/photo2.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        result = certify()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 2
    assert "File too large" in result.stderr
    assert {name: (folder / "out" / name).read_bytes() for name in names()} == before
    assert certify().exit_code == 0
    assert len(contents("out")[2]) == IMAGES


def test_stop_rule(folder):
    options = ["--stop-overlap", 0.3, "--stop-radius", 0.001, "--k", 0.2]
    assert certify(*options, samples=4000, model="counting").exit_code == 0
    certs = [Certificate.load(f"out/photo{index}.safetensors") for index in range(IMAGES)]
    for cert in certs:
        assert float(cert.overlap(72, 0.001).share) >= 0.3
        assert int(cert.samples[0]) < 4000
    assert certify(*options, samples=4000, model="counting").exit_code == 0
    assert _cli_models.passes() < 10  # a few, for what the model does with images of this shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stop-overlap", 0.3], "expected both or none"),
        (["--stop-radius", 0.3], "expected both or none"),
        (["--stop-overlap", 1.3, "--stop-radius", 0.3], "overlap: got 1.3"),
        (["--stop-overlap", 0.3, "--stop-radius", 0], "radius"),
        (["--stop-overlap", 0.3, "--stop-radius", 0.1, "--bound", "kl"], "early stopping takes bound='betting'"),
        (["--on-nonfinite", "ignore"], "on_nonfinite"),
    ],
)
def test_bad_options(folder, options, message):
    result = certify(*options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_image_that_joins_a_finished_one_goes_on_where_it_ended(folder):
    """Small images share batches: the checkpoint of a group holds those that were not finished before."""
    options = ["--stop-overlap", 0.3, "--stop-radius", 0.001, "--k", 0.2]
    for index in (1, 2):
        os.rename(f"photos/photo{index}.png", f"photo{index}.png")
    assert certify(*options, samples=4000, model="counting").exit_code == 0
    for index in (1, 2):
        os.rename(f"photo{index}.png", f"photos/photo{index}.png")
    assert certify(*options, samples=4000, model="interrupted").exit_code == 130
    assert certify(*options, samples=4000, model="counting").exit_code == 0
    assert names().count("photo1.checkpoint") == 0
    certs = [Certificate.load(f"out/photo{index}.safetensors") for index in range(IMAGES)]
    assert all(float(cert.overlap(72, 0.001).share) >= 0.3 for cert in certs)


def test_the_time_of_a_run_with_other_options_is_not_counted(folder):
    """The same image and folder, other samples: another run."""
    manifest = folder / "out" / "manifest.json"

    def seconds(samples, warning=""):
        result = certify(samples=samples)
        assert result.exit_code == 0
        assert (warning in result.stderr) if warning else ("warning" not in result.stderr)
        return [image["seconds"] for image in json.loads(manifest.read_text())["images"]]

    seconds(64)
    found = json.loads(manifest.read_text())
    for image in found["images"]:
        image["seconds"] = 1000.0
    manifest.write_text(json.dumps(found))
    assert seconds(64) == [1000.0] * IMAGES
    assert max(seconds(128, "of 64 samples is of another run (planned_samples): it is replaced")) < 1000
