"""Attacked beside certified: the map that is certified is the one attacked, no true certificate is contradicted."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import robattr_fast as rf
from robattr_fast import attacks

SETTINGS = {"sigma": 0.3, "tau": 0.1, "samples": 1024, "batch_size": 64}


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()


def image() -> torch.Tensor:
    return torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"target": 1}, {"levels": 4, "gamma": 0.03}], ids=str)
def test_no_certificate_is_contradicted_and_the_attack_bites(options):
    net, x = model(), image()
    certificate = rf.certify(net, x, **SETTINGS, **options)
    found = attacks.beside(
        certificate, net, x, k=10, radii=[1.5, 0.03, 0.3], samples=512, attack_samples=32, steps=6, alpha=0.01
    )
    assert found.radii == (0.03, 0.3, 1.5)
    assert torch.equal(found.certified, certificate.overlap(10, found.radii).share)
    assert not found.crossed.any()
    assert (found.attacked_most >= found.attacked).all()
    assert float(found.attacked[-1]) < float(found.noise_floor)
    assert torch.equal(found.gap, found.attacked - found.certified)
    sizes = (found.images[:, 0] - x[0]).flatten(1).norm(dim=1)
    assert (sizes <= torch.tensor(found.radii) * (1 + 1e-6)).all()


def test_a_false_certificate_is_contradicted():
    net, x = model(), image()
    certificate = rf.certify(net, x, **SETTINGS, second_moment=False)
    turned = rf.Certificate(
        samples=certificate.samples, counts=certificate.counts.flip(1), settings=certificate.settings
    )
    assert float(turned.overlap(10, 0.0).share) > 0.3
    found = attacks.beside(turned, net, x, k=10, radii=[0.0], samples=2048, attack_samples=8, steps=1)
    assert found.crossed.all()


def test_another_image_model_or_map_is_refused():
    net, x = model(), image()
    certificate = rf.certify(net, x, **SETTINGS, second_moment=False)
    with pytest.raises(ValueError, match="image 0 is another one"):
        attacks.beside(certificate, net, x / 2, k=10, radii=[0.1])
    other = model()
    other[0].bias.data += 1
    with pytest.raises(ValueError, match="model: got another one"):
        attacks.beside(certificate, other, x, k=10, radii=[0.1])
    summed = dataclasses.replace(certificate.settings, explain="input_x_gradient")
    with pytest.raises(ValueError, match="explain='input_x_gradient'"):
        attacks.beside(
            rf.Certificate(samples=certificate.samples, counts=certificate.counts, settings=summed),
            net, x, k=10, radii=[0.1],
        )  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("typer", reason="the command line needs the extra 'cli'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "attacked_net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n    torch.manual_seed(5)\n    return nn.Sequential("
        "nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()\n"
    )
    np.save(tmp_path / "photo.npy", np.random.default_rng(0).random((3, 10, 10), dtype=np.float32))
    return tmp_path


def run(*arguments: str):
    from typer.testing import CliRunner

    from robattr_fast.cli.app import app

    return CliRunner().invoke(app, [*arguments, "--threads", "1"] if arguments[0] != "report" else list(arguments))


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("attribution", ["gradient", "smoothgrad"])
def test_the_command_line_attacks_photos(folder, attribution):
    result = run(
        "attack", "photo.npy", "--model", "attacked_net:net", "--attribution", attribution, "--goal", "topk",
        "--radius", "0.1", "--radius", "0.6", "--steps", "4", "--samples", "8", "--out", "found",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = read(folder / "found" / "attacks.tsv")
    assert [row["radius"] for row in rows] == ["0.1", "0.6"]
    assert all(float(row["size"]) <= float(row["radius"]) * (1 + 1e-6) for row in rows)
    assert float(rows[1]["topk"]) <= float(rows[0]["topk"]) <= 1
    assert bool(rows[0]["noise_floor"]) == (attribution == "smoothgrad")
    assert (folder / "found" / "photo.attack.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_attacks_certified_maps_and_the_report_shows_both(folder):
    certified = run(
        "certify", "photo.npy", "--model", "attacked_net:net", "--samples", "256", "--batch-size", "32", "--out", "out",
    )  # fmt: skip
    assert certified.exit_code == 0, certified.output
    result = run(
        "attack", "photo.npy", "--model", "attacked_net:net", "--certificates", "out", "--radius", "0.02", "--radius",
        "0.4", "--steps", "3", "--samples", "16", "--out", "found",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = read(folder / "out" / "photo.attacked.tsv")
    assert [float(row["radius"]) for row in rows] == [0.02, 0.4]
    assert all(float(row["attacked_most"]) >= float(row["certified"]) for row in rows)
    assert run("report", "out", "--out", "page.html").exit_code == 0
    text = (folder / "page.html").read_text()
    assert "left by an attack" in text
    assert f'"attacked": [[0.02, {float(rows[0]["attacked"])}]' in text
    (folder / "out" / "photo.attacked.tsv").write_text("k\tradius\nmany\t1\n")
    assert run("report", "out", "--out", "page.html").exit_code == 2


def test_the_command_line_refuses_what_it_cannot_do(folder):
    assert run("attack", "photo.npy", "--model", "attacked_net:net", "--goal", "all").exit_code == 2
    missing = run("attack", "photo.npy", "--model", "attacked_net:net", "--certificates", "nowhere")
    assert missing.exit_code == 1
