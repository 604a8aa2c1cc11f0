"""Gradients of a smoothed map, with memory that does not grow with the samples.

Nothing of the forward pass is kept: the noise is a function of its indices, so that the backward pass draws each batch
again, differentiates its maps and lets it go.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robattr_fast import model as _model
from robattr_fast.errors import ModelError
from robattr_fast.sampling.batch import Segment, next_batch
from robattr_fast.sampling.sampler import Sampler

_MISSING_DERIVATIVE = re.compile(r"derivative for aten::(\w+?)(?:_backward)? is not implemented")


class Recomputation:
    """The derivative of mean over samples of f(g - centre), g the input gradients of ``model`` at noisy copies of x.

    Args:
        model: the user's, in eval mode; its parameters get the gradients.
        sampler: of the same model and x; it sets the batch size and draws the noise.
        f: maps gradients [N, *S] to maps [N, *S], row by row, differentiably.
    """

    def __init__(
        self, model: nn.Module, sampler: Sampler, f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> None:
        copy = _model.private_copy(model, frozen=False)  # not folded: folding cuts the graph to the parameters
        self.model = copy
        self.sampler = sampler
        self.f = f
        self.x = x
        pairs = list(zip(model.parameters(), copy.parameters(), strict=True))
        self.parameters = [theirs for theirs, _ in pairs if theirs.requires_grad]
        self._own = [ours for theirs, ours in pairs if theirs.requires_grad]
        self._surroundings = _Surroundings(x.device.type)

    def check(self, first_sample: int) -> None:
        """ModelError, naming operator and remedy, if the model cannot be differentiated twice: tried on one row.

        An operator that hides a second derivative that it does have (whose backward leaves autograd) cannot be told
        from one whose second derivative is zero.
        """
        scaled = _Scaled(self.model)

        def attempt(segments, batch, target):
            gradient, _ = _model.input_gradient(scaled, batch.detach().requires_grad_(), target, create_graph=True)
            with torch.enable_grad():
                maps = self.f(gradient)
            # Through all of the graph: what does not lead to an input that is asked for would be left out, and so
            # would an operator there that only says in its backward that it has none.
            maps.backward(torch.ones_like(maps))

        def functions(segments, batch, target):
            return _python_functions(_model.forward(self.model, batch.detach().requires_grad_()))

        first = [Segment(0, first_sample, 1)]
        try:
            self.sampler.apply(first, attempt)
        except ModelError:
            raise
        except Exception as error:  # whatever an operator says that has no second derivative
            raise ModelError(_explanation(error, self.sampler.apply(first, functions))) from error
        finally:
            self.model.zero_grad()

    def attach(
        self, value: torch.Tensor, first_sample: int, samples: int, centre: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``value`` [B, *S], the smoothed map, with a graph to x and to the model's parameters.

        centre: [B, *S], constant; None for 0.
        """

        def pull_back(cotangent: torch.Tensor, wanted: Sequence[bool]) -> list[torch.Tensor | None]:
            with self._surroundings.restored():
                return self._pull_back(cotangent, wanted, first_sample, samples, centre)

        return _Attach.apply(value, pull_back, self.x, *self.parameters)

    def _pull_back(
        self,
        cotangent: torch.Tensor,
        wanted: Sequence[bool],
        first_sample: int,
        samples: int,
        centre: torch.Tensor | None,
    ) -> list[torch.Tensor | None]:
        """Gradients with respect to x and the parameters, for the gradient [B, *S] of the map."""
        sampler = self.sampler
        # The model's passes may be in half precision, where small cotangents would vanish.
        largest = cotangent.abs().amax().to(torch.float64)
        scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        weight = cotangent.to(torch.float64) / scale
        inputs = [sampler.x, *self._own]
        # Half types would lose what later samples add.
        sums = [
            torch.zeros(tensor.shape, dtype=_sum_dtype(tensor), device=tensor.device) if want else None
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        done, all_samples = [0] * sampler.x.shape[0], [samples] * sampler.x.shape[0]

        def work(segments, batch, target):
            return segments, self._gradients(segments, batch, target, weight, wanted, centre)

        while segments := next_batch(done, all_samples, first_sample, sampler.batch_size):
            segments, (rows, *gradients) = sampler.apply(segments, work)
            row = 0
            for segment in segments:
                if sums[0] is not None and rows is not None:
                    sums[0][segment.image] += rows[row : row + segment.count].sum(dim=0, dtype=sums[0].dtype)
                row += segment.count
                done[segment.image] += segment.count
            for total, gradient in zip(sums[1:], gradients, strict=True):
                if total is not None and gradient is not None:
                    total += gradient
        return [
            None if total is None else (total * (scale / samples)).to(like.dtype)
            for total, like in zip(sums, inputs, strict=True)
        ]

    def _gradients(
        self,
        segments: Sequence[Segment],
        batch: torch.Tensor,
        target: torch.Tensor | None,
        weight: torch.Tensor,
        wanted: Sequence[bool],
        centre: torch.Tensor | None,
    ) -> list[torch.Tensor | None]:
        """Of sum weight[image] f(g - centre[image]) over the segments' rows, with respect to batch and parameters."""
        rows = batch.detach().requires_grad_()
        gradient, _ = _model.input_gradient(self.model, rows, target, create_graph=True)
        weights = _per_row(weight, segments)
        with torch.enable_grad():
            gradient = gradient[: weights.shape[0]]
            maps = self.f(gradient if centre is None else gradient - _per_row(centre, segments))
        found: list[torch.Tensor | None] = [None] * len(wanted)
        if not maps.requires_grad:  # a linear model with frozen parameters
            return found
        inputs = [rows, *self._own]
        places = [i for i, want in enumerate(wanted) if want]
        derivatives = torch.autograd.grad(maps, [inputs[i] for i in places], weights.to(maps.dtype), allow_unused=True)
        for i, derivative in zip(places, derivatives, strict=True):
            found[i] = derivative
        return found


def _per_row(images: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """images [B, *S] repeated for the rows of the segments."""
    return torch.cat([images[s.image].expand(s.count, *images.shape[1:]) for s in segments])


class _Attach(torch.autograd.Function):
    """The value as it is; its gradient by ``pull_back(gradient, which inputs want one)``."""

    @staticmethod
    def forward(ctx, value, pull_back, *inputs):
        ctx.pull_back = pull_back
        ctx.save_for_backward(*inputs)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        inputs = ctx.saved_tensors  # raises if x or a parameter was changed in place since
        gradients = ctx.pull_back(gradient.detach(), ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():
            present = [g for g in gradients if g is not None]
            barred = iter(_Barrier.apply(len(present), *present, gradient, *inputs))
            gradients = [None if g is None else next(barred) for g in gradients]
        return None, None, *gradients


class _Barrier(torch.autograd.Function):
    """The first ``count`` tensors as they are; a gradient of them is an error and not a silent zero.

    The others are what they depend on. (`once_differentiable` lets a gradient pass unnoticed that is taken with respect
    to named inputs, since nothing leads there.)
    """

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("smoothgrad(differentiable=True) can be differentiated once, not twice")


class _Scaled(nn.Module):
    """The model times a parameter that is 1: so that of every operator's backward the input requires gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.model(batch)
        return logits * self.one.to(logits)


class _Surroundings:
    """Autocast and the attention kernels allowed, as they are now: the backward pass may run outside of both."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        allowed = {
            SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
            SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
            SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
            SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        }
        self._attention = [kernel for kernel, is_allowed in allowed.items() if is_allowed]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        enabled, dtype = self._autocast
        with torch.autocast(self._device_type, dtype=dtype, enabled=enabled), sdpa_kernel(self._attention):
            yield


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _explanation(error: Exception, functions: set[str]) -> str:
    """Who has no second derivative, and what to do; ``functions`` are the torch.autograd.Functions in the model."""
    missing = _MISSING_DERIVATIVE.search(str(error))
    who = missing[1] if missing else f"an operator (of its own: {', '.join(sorted(functions))})" if functions else "it"
    remedy = "use an operator that has one"
    if missing and "attention" in missing[1]:
        remedy = "call smoothgrad under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use rf.linear_attention"
    return f"model: {who} has no second derivative, which differentiable=True needs; {remedy} ({error})"


def _python_functions(logits: torch.Tensor) -> set[str]:
    """Names of the torch.autograd.Functions in the graph of the logits."""
    names: set[str] = set()
    seen, left = set(), [logits.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            names.add(type(node).__name__.removesuffix("Backward"))
        left.extend(following for following, _ in node.next_functions)
    return names
