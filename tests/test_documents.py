"""What the documents show runs: the code of the pages and the examples; links lead somewhere."""

import gzip
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _photos import write_photos
from models import cnn_of_photographs, small_cnn

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / "README.md").is_file():
    pytest.skip("the documents are not beside the tests", allow_module_level=True)


def snippets(page: str) -> str:
    """The Python of one page."""
    return "\n".join(part.split("```")[0] for part in (ROOT / page).read_text().split("```python\n")[1:])


PAGES = [
    "README.md",
    "docs/python.md",
    "docs/attacks.md",
    "docs/attention.md",
    "docs/attributions.md",
    "docs/folders.md",
    "docs/integrations.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    if page == "docs/integrations.md":
        for package in ("transformers", "captum"):
            pytest.importorskip(package, reason=f"the page needs {package}")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippets(page), page, "exec"), names)
    if "gradient" in names:
        for name, parameter in names["model"].named_parameters():
            assert bool(parameter.grad.isfinite().all()), name
            assert float(parameter.grad.abs().max()) > 0, name


def test_links_lead_to_pages():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_listed():
    listed = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not {page for page in pages if f"({page})" not in listed}


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    """40 images a split, in the files of Fashion-MNIST."""
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", rng.integers(0, 256, (40, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", rng.integers(0, 10, 40, dtype=np.uint8))
    return tmp_path


EXAMPLE = ROOT / "examples" / "attention_robustness.py"


def run_example(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_attention_example(fashion, tmp_path):
    small = ["--epochs", "1", "--batch", "20", "--attacked", "2", "--steps", "2", "--sizes", "0.5", "--seeds", "2"]
    done = run_example(
        "--data", str(fashion), "--plot", str(tmp_path / "plot.png"), "--attention", "softmax", "elu", *small
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| softmax", "| elu"))]
    assert [row.split(" | ")[3] for row in rows] == ["0.5", "0.5"]
    assert "nan" not in done.stdout
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_attention_example_without_data(tmp_path):
    done = run_example("--data", str(tmp_path))
    assert done.returncode != 0
    assert "apt-get install dataset-fashion-mnist" in done.stderr


def test_attacks_keep_their_size_and_find_more_than_chance():
    spec = importlib.util.spec_from_file_location("attention_robustness", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch = example.torch
    torch.manual_seed(0)
    model = example.TinyViT().eval()
    example.kernelize(model)
    x, target = torch.rand(2, 1, 28, 28), torch.tensor([1, 2])
    for attribution in (example.gradient, example.attention):
        before = attribution(model, x, target).detach()
        changes = []
        for steps in (0, 5):
            torch.manual_seed(1)
            delta = example.attacked(attribution, model, x, target, before, 0.5, steps)
            torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((2,), 0.5))
            changes.append(example.change(before, attribution(model, x + delta, target)).detach())
        assert bool((changes[1] > changes[0]).all())


def test_example_of_attacked_beside_certified(fashion, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("attacked", EXAMPLE.parent / "attacked_beside_certified.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "trained", lambda folder: small_cnn(1, 28, 10))
    small = "--images 1 --radii 0.01 1.0 --samples 128 --check 64 --attack-samples 8 --steps 2"
    table = tmp_path / "pairs.tsv"
    monkeypatch.setattr(sys, "argv", ["attacked", "--data", str(fashion), "--out", str(table), *small.split()])
    example.main()
    head, *rows = [line.split("\t") for line in table.read_text().splitlines()]
    assert tuple(head) == example.FIELDS
    assert [(row[3], row[-1]) for row in rows] == [("0.01", "0"), ("1.0", "0")]
    assert "2 pairs, 0 crossed" in capsys.readouterr().out


def test_pixel_example(tmp_path, monkeypatch, capsys):
    pytest.importorskip("captum", reason="the example explains by it")
    spec = importlib.util.spec_from_file_location("pixel_certificates", EXAMPLE.parent / "pixel_certificates.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    write_photos(tmp_path / "photos", 4)
    for label, path in enumerate(sorted((tmp_path / "photos").iterdir())):
        path.rename(path.with_name(f"{path.stem}_{label}.png"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(example.rf, "tune_allocator", lambda: None)
    names = [name for name in example.methods("2", 20, 4) if name != "relevance propagation"]  # no rule for Flatten
    settings = "--model models:cnn_of_photographs --layer 2 --grids 1 --cell 6 --window 4 --samples 60 --batch 60"
    chosen = [str(tmp_path / "photos"), *settings.split(), "--steps", "4", "--method", *names]
    monkeypatch.setattr(sys, "argv", ["pixel_certificates", *chosen])
    example.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == names
    for row in rows:
        selected, out = float(row[1]), float(row[2])
        assert 0 <= selected <= 60
        assert 0 < selected + out <= 100
        assert len(row[4].split(" (")[0].split()) == 4
    assert len({row[1] for row in rows}) > 3
    # Behind an average and a linear layer a channel is missed as much as it adds to the logit.
    model, x, target = cnn_of_photographs(), torch.rand(2, 3, 6, 8), torch.tensor([3, 1])
    with torch.no_grad():
        activation = model[:2](x)
        added = model[4].weight[target] * activation.mean(dim=(2, 3)) / model(x).gather(1, target[:, None])
        expected = torch.einsum("bk,bkhw->bhw", added, activation).relu()
    torch.testing.assert_close(example.ablation_cam(model, x, target, layer="2"), expected, rtol=1e-4, atol=1e-6)
