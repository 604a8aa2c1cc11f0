"""Whether the operators of this installation compute what they should: `check_operators`.

A self-check runs the chosen backend of one operator on small cases: against results that are known beforehand, and
against the reference: bit for bit, save for bounds, which every backend rounds outwards in its own way.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from robattr_fast import backends, reference
from robattr_fast.ops.betting_bounds import betting_bounds
from robattr_fast.ops.count_sparsified import count_sparsified_
from robattr_fast.ops.linear_attention import linear_attention
from robattr_fast.ops.mlp_smoothgrad import mlp_smoothgrad
from robattr_fast.ops.noisy_samples import noisy_samples
from robattr_fast.ops.packed_gram import packed_gram
from robattr_fast.ops.soft_topk import soft_topk
from robattr_fast.ops.sparsify import sparsify
from robattr_fast.ops.topk_threshold import topk_threshold
from robattr_fast.reference._pack_levels import packed_row_bytes
from robattr_fast.reference.betting_bounds import betting_shares
from robattr_fast.reference.linear_attention import linear_attention_backward, linear_attention_double_backward

_LONGEST_DETAIL = 160

Case = tuple[str, torch.Tensor, torch.Tensor]
"""What was computed, the result, what it should be."""


@dataclass(frozen=True)
class OperatorReport:
    """One operator on one device: the backend that runs it, why not an earlier one, what its self-check found."""

    operator: str
    device: str
    backend: str
    passed_over: dict[str, str]
    check: str
    """"ok", "failed" or "none"."""
    detail: str


def check_operators() -> list[OperatorReport]:
    """Check every operator on every device present, on the backend that the preference in force chooses."""
    return [_check(explanation) for explanation in backends.explain()]


def _check(explanation: backends.Explanation) -> OperatorReport:
    name = explanation.operator
    result, detail = "none", "no self-check"
    if name in CHECKS:
        try:
            with backends.use(explanation.backend, strict=True):
                cases = CHECKS[name](torch.device(explanation.device))
            detail = "; ".join(filter(None, (_difference(*case) for case in cases)))
            result = "failed" if detail else "ok"
        except Exception as error:  # whatever a broken kernel raises is the finding
            first_line = str(error).partition("\n")[0]
            result, detail = "failed", f"{type(error).__name__}: {first_line[:_LONGEST_DETAIL]}"
    return OperatorReport(name, explanation.device, explanation.backend, explanation.passed_over, result, detail)


def _difference(what: str, got: torch.Tensor, expected: torch.Tensor) -> str:
    """Where two tensors differ in dtype, shape or bits; empty if nowhere."""
    got, expected = got.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"{what}: {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    same = got.view(-1, 1).view(torch.uint8) == expected.view(-1, 1).view(torch.uint8)
    wrong = (~same.all(dim=1)).nonzero()
    if not len(wrong):
        return ""
    first = int(wrong[0])
    values = got.flatten()[first].item(), expected.flatten()[first].item()
    return (
        f"{what}: {len(wrong)} of {got.numel()} elements differ, the first at {first}: {values[0]!r}, not {values[1]!r}"
    )


def _sha256(tensor: torch.Tensor) -> torch.Tensor:
    """The first eight bytes of the SHA-256 of a tensor's bytes, as one int64."""
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).digest()
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True)])


def _check_noisy_samples(device: torch.device) -> list[Case]:
    # Powers of two apart from 0: adding them to the noise rounds in every position.
    x = torch.tensor([0.0, 1.0, -64.0, 2.0**-20], device=device).repeat(2, 250)[:, :999]
    ids = torch.tensor([0, 2**32 - 1], device=device)
    got = noisy_samples(x, 0.25, 5, seed=2**64 - 3, first_sample=2**32 - 9, image_ids=ids)
    expected = reference.noisy_samples(x, 0.25, 5, seed=2**64 - 3, first_sample=2**32 - 9, image_ids=ids)
    return [
        ("pinned noise", _sha256(got), torch.tensor([_PINNED_NOISE])),
        ("noise", got, expected),
    ]


_PINNED_NOISE = 2086902423366689511


def _scores(device: torch.device) -> torch.Tensor:
    """Rows with ties, signed zeros, denormals and huge values, [3, 7, 1000]; every bit of it is known."""
    index = torch.arange(21_000, dtype=torch.int64)
    scores = ((index * 2654435761) % 65_537).float()  # Knuth's multiplicative hash: no random state is touched
    scores[index % 5 == 0] = 12_345.0
    scores[index % 7 == 0] = -0.0
    scores[index % 11 == 0] = 1e-42
    scores[index % 1009 == 0] = 3e38
    return scores.view(3, 7, 1000).to(device)


def _check_topk_threshold(device: torch.device) -> list[Case]:
    small = torch.tensor([3.0, 1.0, 3.0, -torch.inf, 2.0], device=device)
    cases = [
        (f"{k} of a row known by heart", topk_threshold(small, k), torch.tensor(expected))
        for k, expected in ((1, 3.0), (2, 3.0), (3, 2.0), (5, -torch.inf))
    ]
    for k in (1, 100, 1000):
        cases.append((f"k={k}", topk_threshold(_scores(device), k), reference.topk_threshold(_scores(device), k)))
    return cases


def _check_sparsify(device: torch.device) -> list[Case]:
    small = torch.tensor([4.0, 8.0, 1.0, 2.0, 2.0, 6.0, 0.0, -1.0], device=device)
    known = torch.tensor([0.5, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])  # tau .5 cuts through the twos; g = 8 > 4 = half
    cases = [("a row known by heart", sparsify(small, 0.5, 0.125, levels=2), known)]
    for levels in (1, 15, None):
        got = sparsify(_scores(device), 0.1, 0.02, levels=levels)
        cases.append((f"levels={levels}", got, reference.sparsify(_scores(device), 0.1, 0.02, levels=levels)))
    return cases


def _check_count_sparsified_(device: torch.device) -> list[Case]:
    cases = []
    small = torch.tensor([[[4.0, 8.0, 1.0, 0.0], [8.0, 8.0, 8.0, 1.0], [torch.nan, 1.0, 2.0, 3.0]]], device=device)
    counts = torch.zeros(1, 4, 1, dtype=torch.int32, device=device)
    invalid = count_sparsified_(counts, small, 0.5)
    # Of the second row three elements tie for two places: none is kept. The third holds a NaN.
    known = torch.tensor([1, 1, 0, 0], dtype=torch.int32).view(1, 4, 1)
    cases += [("counts known by heart", counts, known), ("invalid samples", invalid, torch.ones(1, dtype=torch.int32))]
    for levels in (1, 15):
        got, expected = (torch.zeros(3, 1000, levels, dtype=torch.int32, device=device) for _ in range(2))
        shape = 3, 7, packed_row_bytes(1000, levels)
        packed, expected_packed = (torch.full(shape, 255, dtype=torch.uint8, device=device) for _ in range(2))
        count_sparsified_(got, _scores(device), 0.1, 0.02, packed=packed)
        reference.count_sparsified_(expected, _scores(device), 0.1, 0.02, packed=expected_packed)
        cases += [(f"levels={levels}", got, expected), (f"packed, levels={levels}", packed, expected_packed)]
    return cases


def _check_mlp_smoothgrad(device: torch.device) -> list[Case]:
    # d f_0 / d z is 1, 3, 2, 0 wherever z is: of equal noise, nothing matters.
    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]], device=device)
    counts = torch.zeros(1, 4, 2, dtype=torch.int32, device=device)
    bias, target = torch.tensor([9.0, -90.0], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    classes = mlp_smoothgrad(counts, x, [weight], [bias], 0.1, 7, 0.75, 0.25, target=target)
    known = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 0]], dtype=torch.int32).view(1, 4, 2) * 7
    cases = [
        ("counts known by heart", counts, known),
        ("classes known by heart", classes, torch.zeros(1, 7, dtype=torch.int64)),
    ]
    # Small integers: gradients are exact in every backend.
    sizes = (100, 20, 17, 3)
    integers = ((torch.arange(2100, dtype=torch.int64) * 2654435761) % 65_537 % 5 - 2).float().to(device)
    weights = [integers[inputs:][: outputs * inputs].view(outputs, inputs) for inputs, outputs in pairwise(sizes)]
    biases = [torch.zeros(outputs, device=device) for outputs in sizes[1:]]
    x = integers[:200].view(2, 100)
    for levels in (1, 15):
        got, expected = (torch.zeros(2, 100, levels, dtype=torch.int32, device=device) for _ in range(2))
        arguments = x, weights, biases, 0.5, 40, 0.2, 0.1
        classes, expected_classes = mlp_smoothgrad(got, *arguments), reference.mlp_smoothgrad(expected, *arguments)
        cases += [(f"levels={levels}", got, expected), (f"classes, levels={levels}", classes, expected_classes)]
    return cases


def _check_packed_gram(device: torch.device) -> list[Case]:
    small = torch.tensor([[1, 2, 0], [0, 3, 3]], dtype=torch.uint8, device=device)
    cases = [
        (
            "products known by heart",
            packed_gram(reference.pack_levels(small, 3), 3),
            torch.tensor([[5, 6], [6, 18]]),
        )
    ]
    for levels in (1, 15):
        rows = reference.pack_levels((_scores(device)[0].long() % (levels + 1)).to(torch.uint8), levels)
        got, expected = packed_gram(rows, levels, rows[2:5]), reference.packed_gram(rows, levels, rows[2:5])
        cases.append((f"levels={levels}", got, expected))
    return cases


def _check_soft_topk(device: torch.device) -> list[Case]:
    # So cold that every sigmoid is 0 or 1 in every backend's arithmetic.
    small = torch.tensor([3.0, -1.0, 2.0, 0.0, 9.0], device=device)
    known = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    cases = [("a row known by heart", soft_topk(small, 3, 1e-3), known)]
    scores = _scores(device)[..., :300].double()
    scores = torch.where(scores < 1e6, scores, 1.0)
    for temperature in (10.0, 1e4, 1e8):
        got, expected = soft_topk(scores, 30, temperature), reference.soft_topk(scores, 30, temperature)[0]
        cases.append(_close(f"T={temperature:g}", got, expected, torch.ones(())))
    return cases


def _check_betting_bounds(device: torch.device) -> list[Case]:
    counts = torch.tensor([[[0], [1]]], dtype=torch.int32, device=device)
    lower, upper = betting_bounds(counts, 1, 0.1)
    share = betting_shares(torch.device("cpu")).mean().item()
    closed = share / (share + 9)  # one sample of value 1: W(m) = 1 - share + share / m = 10
    cases = [
        ("lower bound of zeros", lower[0, :1], torch.zeros(1, dtype=torch.float64)),
        ("upper bound of ones", upper[0, 1:], torch.ones(1, dtype=torch.float64)),
        _close("lower bound of one sample", lower[0, 1:], torch.tensor([closed], dtype=torch.float64)),
        _close("upper bound of one sample", 1 - upper[0, :1], torch.tensor([closed], dtype=torch.float64)),
    ]
    for levels in (1, 15):
        counts = (_scores(device)[0, :, : 5 * levels].int() % 97).view(1, -1, levels)
        bounds = betting_bounds(counts, 1500, 1e-3), reference.betting_bounds(counts, 1500, 1e-3)
        for name, got, expected in zip(("lower", "upper"), *bounds, strict=True):
            cases.append(_close(f"{name} bound, levels={levels}", got, expected))
    return cases


def _linear_attention_arguments(device: torch.device, *shape: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """u_q, u_k, u_v, grad, q, k, v of this shape, small integers in float64, and a mask of the keys."""
    tensors = [((_scores(device)[0, row] % 7) - 3)[: math.prod(shape)].view(shape).double() for row in range(7)]
    return tensors, torch.arange(shape[2], device=device).expand(shape[0], -1) % 3 < 2


def _linear_attention_cases(
    device: torch.device, run: Callable[..., Any], definition: Callable[..., Any], last: int
) -> list[Case]:
    """``run`` against its definition, both taking the ``last`` of the arguments and keywords, without their rounding
    and with it."""
    cases = []
    # All weights are small integers and the mean is over 4 keys: every backend is exact.
    tensors, _ = _linear_attention_arguments(device, 1, 2, 4, 3)
    keywords = {"feature_map": "relu", "causal": False, "normalize": False, "key_padding_mask": None, "eps": 0.0}
    results = (function(*tensors[-last:], **keywords) for function in (run, definition))
    for index, (got, expected) in enumerate(zip(*map(_as_tuple, results), strict=True)):
        cases.append((f"exact result {index}", got, expected))
    tensors, mask = _linear_attention_arguments(device, 2, 2, 37, 5)
    for causal in (False, True):
        keywords = {"feature_map": "elu", "causal": causal, "normalize": True, "key_padding_mask": mask, "eps": 1e-6}
        results = (function(*tensors[-last:], **keywords) for function in (run, definition))
        for index, (got, expected) in enumerate(zip(*map(_as_tuple, results), strict=True)):
            cases.append(_close(f"result {index}, causal={causal}", got, expected, expected.abs().max().cpu()))
    return cases


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _with_keywords(operator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors, **keywords: operator(*tensors, *keywords.values())


def _check_linear_attention(device: torch.device) -> list[Case]:
    q, k = torch.tensor([[[[1.0, 2.0]]]], device=device), torch.tensor([[[[1.0, -1.0], [3.0, 1.0]]]], device=device)
    v = torch.tensor([[[[6.0], [12.0]]]], device=device)
    # Weights 1 and 5 (relu: the -1 is 0); (1 * 6 + 5 * 12) / 6 = 11.
    known = linear_attention(q, k, v, feature_map="relu", eps=0.0)
    return [
        ("a row known by heart", known, torch.full((1, 1, 1, 1), 11.0)),
        *_linear_attention_cases(device, linear_attention, reference.linear_attention, 3),
    ]


def _check_linear_attention_backward(device: torch.device) -> list[Case]:
    operator = _with_keywords(torch.ops.robattr_fast.linear_attention_backward)
    return _linear_attention_cases(device, operator, linear_attention_backward, 4)


def _check_linear_attention_double_backward(device: torch.device) -> list[Case]:
    operator = _with_keywords(torch.ops.robattr_fast.linear_attention_double_backward)
    return _linear_attention_cases(device, operator, linear_attention_double_backward, 7)


def _close(what: str, got: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> Case:
    """A case of which a backend need not give the expected bits: values nearer than 1e-9 of the scale, by default the
    expected value itself, pass for the expected ones."""
    got, expected = got.cpu(), expected.cpu()
    near = (got - expected).abs() <= 1e-9 * (expected if scale is None else scale)
    return what, torch.where(near, expected, got), expected


CHECKS: dict[str, Callable[[torch.device], list[Case]]] = {
    "noisy_samples": _check_noisy_samples,
    "topk_threshold": _check_topk_threshold,
    "sparsify": _check_sparsify,
    "soft_topk": _check_soft_topk,
    "count_sparsified_": _check_count_sparsified_,
    "mlp_smoothgrad": _check_mlp_smoothgrad,
    "packed_gram": _check_packed_gram,
    "betting_bounds": _check_betting_bounds,
    "linear_attention": _check_linear_attention,
    "linear_attention_backward": _check_linear_attention_backward,
    "linear_attention_double_backward": _check_linear_attention_double_backward,
}
"""Per operator the cases of its self-check, through the public function on the backend in force; derivatives, which
have none, through the operator."""
