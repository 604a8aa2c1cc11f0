"""Does kernel attention make attributions of a transformer harder to move than softmax attention does? Fashion-MNIST.

The same small vision transformer is trained from the same weights by the same SGD, once per kind of attention and seed.
Then two attributions are looked at under perturbations of one L2 size, random ones and ones found by projected gradient
ascent on the change of the attribution itself:

- gradient: d (logit of the predicted class) / d pixels, whose ascent differentiates it again;
- attention: the last layer's weights from the class token to the patches, mean over heads, less their mean over the
  patches, which would hide every change in a cosine.

Change is 1 - cosine of the maps before and after; overlap is the share of the top tenth that stays. No box is put
around the perturbed image, so that all perturbations have the size they claim.

    python examples/attention_robustness.py --plot attention.png

The images are those of the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or any folder
with the four .gz files of Fashion-MNIST (--data).
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import robattr_fast as rf
from robattr_fast.nn import attention_entropy, attention_maps, kernelize

ATTENTION = {
    "softmax": None,
    "elu": {"kernel": "elu"},
    "gaussian": {"kernel": "gaussian"},
    "gaussian, mean": {"kernel": "gaussian", "normalize": False},
}
PATCH, WIDTH, DEPTH, HEADS, CLASSES = 4, 48, 2, 4, 10
PATCHES = (28 // PATCH) ** 2


class TinyViT(nn.Module):
    """[B, 1, 28, 28] in [0, 1] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + PATCHES, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        for block in self.encoder.layers:
            nn.init.xavier_uniform_(block.self_attn.in_proj_weight)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.embed((x - 0.286) / 0.353).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.position
        return self.head(self.encoder(tokens)[:, 0])


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped file of the MNIST format: magic, sizes (big-endian), bytes."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: apt-get install dataset-fashion-mnist, or name a folder with --data")
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def load(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(read_idx(folder / f"{split}-images-idx3-ubyte.gz").copy())[:, None] / 255
    labels = torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64))
    return images, labels


def trained(kind: str, seed: int, images: torch.Tensor, labels: torch.Tensor, options: argparse.Namespace) -> nn.Module:
    """The transformer after SGD; the seed alone sets the weights it starts from and the order of the images."""
    torch.manual_seed(seed)
    model = TinyViT()
    if ATTENTION[kind] is not None:
        kernelize(model, **ATTENTION[kind])
    steps = options.epochs * (len(images) // options.batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps, pct_start=0.2)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(images)).split(options.batch):
            if len(rows) < options.batch:
                continue
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


Attribution = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def gradient(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    x = x if x.requires_grad else x.clone().requires_grad_()
    score = model(x).gather(1, target[:, None]).sum()
    return torch.autograd.grad(score, x, create_graph=True)[0].flatten(1)


def attention(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    weights = list(attention_maps(model, x).values())[-1].mean(dim=1)[:, 0, 1:]
    return weights - weights.mean(dim=1, keepdim=True)


def change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(before, after, dim=1)


def resized(step: torch.Tensor, size: float) -> torch.Tensor:
    return size * step / step.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]


def attacked(attribution: Attribution, model: nn.Module, x, target, before, size: float, steps: int) -> torch.Tensor:
    """The perturbation of this L2 size, along projected gradient ascent, that changes each map most."""
    best = delta = resized(torch.randn_like(x), size)
    most = torch.full((len(x),), -1.0)
    for step in range(steps + 1):
        delta = delta.detach().requires_grad_()
        found = change(before, attribution(model, x + delta, target))
        better = found.detach() > most
        most = torch.where(better, found.detach(), most)
        best = torch.where(better[:, None, None, None], delta.detach(), best)
        if step < steps:
            (ascent,) = torch.autograd.grad(found.sum(), delta)
            delta = resized(delta.detach() + resized(ascent, 0.5 * size), size)
    return best


def measure(model: nn.Module, images, labels, options: argparse.Namespace) -> dict[tuple, float]:
    """(what, attribution, perturbation, size) -> mean over images."""
    with torch.no_grad():
        result = {("accuracy",): float((model(images).argmax(1) == labels).float().mean())}
        maps = attention_maps(model, images[: options.attacked])
        entropy = torch.stack([attention_entropy(m).value.mean() for m in maps.values()]).mean()
        result[("entropy",)] = float(entropy) / float(np.log(1 + PATCHES))
    x = images[: options.attacked]
    with torch.no_grad():
        target = model(x).argmax(1)
    for name, attribution in (("gradient", gradient), ("attention", attention)):
        before = attribution(model, x, target).detach()
        k = max(1, before.shape[1] // 10)
        for size in options.sizes:
            for how in ("random", "adversarial"):
                torch.manual_seed(0)
                steps = 0 if how == "random" else options.steps
                delta = attacked(attribution, model, x, target, before, size, steps)
                after = attribution(model, x + delta, target).detach()
                kept = rf.overlap(*((m.abs() if name == "gradient" else m) for m in (before, after)), k)
                result["change", name, how, size] = float(change(before, after).mean())
                result["overlap", name, how, size] = float(kept.mean())
    return result


def table(results: dict[str, list[dict]], sizes: list[float]) -> str:
    """Markdown: one row per attention and size, mean over seeds and, in brackets, their standard deviation."""

    def cell(runs: list[dict], *key: object) -> str:
        values = [run[key] for run in runs]
        spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    columns = [(name, how) for name in ("gradient", "attention") for how in ("random", "adversarial")]
    head = ["attention", "accuracy", "entropy / log n", "L2"]
    head += [f"{name}, {how}: {what}" for name, how in columns for what in ("change", "overlap")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind, runs in results.items():
        for size in sizes:
            cells = [kind, cell(runs, "accuracy"), cell(runs, "entropy"), f"{size:g}"]
            cells += [cell(runs, what, name, how, size) for name, how in columns for what in ("change", "overlap")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, list[dict]], sizes: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    panels = [(name, how) for name in ("gradient", "attention") for how in ("random", "adversarial")]
    for axis, (name, how) in zip(axes, panels, strict=True):
        for kind, runs in results.items():
            values = np.array([[run["change", name, how, size] for size in sizes] for run in runs])
            axis.errorbar(sizes, values.mean(0), values.std(0), marker="o", capsize=3, label=kind)
        axis.set(title=f"{name}, {how}", xlabel="L2 size of the perturbation", ylim=(0, None))
    axes[0].set_ylabel("change of the map (1 - cosine)")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10000, help="training images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.1, help="largest learning rate of the cycle")
    parser.add_argument("--attacked", type=int, default=64, help="test images that are perturbed")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument("--steps", type=int, default=10, help="of projected gradient ascent")
    parser.add_argument("--plot", type=Path, help="write the curves to this file")
    options = parser.parse_args()

    train = [part[: options.images] for part in load(options.data, "train")]
    test = [part[:2000] for part in load(options.data, "t10k")]
    results = defaultdict(list)
    # The fused softmax attention has no second derivative; MATH has.
    with sdpa_kernel(SDPBackend.MATH):
        for seed in range(options.seeds):
            for kind in options.attention:
                start = time.perf_counter()
                model = trained(kind, seed, *train, options)
                middle = time.perf_counter()
                results[kind].append(measure(model, *test, options))
                seconds = f"{middle - start:.0f} s training, {time.perf_counter() - middle:.0f} s attacks"
                print(f"{kind}, seed {seed}: accuracy {results[kind][-1]['accuracy',]:.3f}, {seconds}", flush=True)
    print(f"\n{table(results, options.sizes)}")
    if options.plot:
        plot(results, options.sizes, options.plot)


if __name__ == "__main__":
    main()
