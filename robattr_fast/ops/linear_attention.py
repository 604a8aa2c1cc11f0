"""`linear_attention`: checks, public function, kernels, derivatives. Definition: reference/.

Three operators: the forward, its backward, and the backward of that. Each one's autograd calls the next; the last one's
differentiates the reference. Each is a function of its inputs alone, and nothing else is kept for the next.
"""

from __future__ import annotations

import math

import torch

from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.reference.linear_attention import FEATURE_MAPS
from robattr_fast.reference.linear_attention import linear_attention as definition
from robattr_fast.reference.linear_attention import linear_attention_backward as definition_of_backward
from robattr_fast.reference.linear_attention import linear_attention_double_backward as definition_of_double_backward

MAX_WIDTH = 256
MAX_POSITIONS = 65536


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Attention with the kernel phi(q_i) . phi(k_j), in time and memory linear in the number of positions.

    o_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + eps) over the keys j that row i sees: all; with
    a mask those it keeps; causal those with j <= i.

    Args:
        q: [B, H, Nq, D], 1 <= D <= 256, 1 <= Nq <= 65536; float32, float64, bfloat16 or float16, any strides.
        k: [B, H, Nk, D], 1 <= Nk <= 65536, the dtype of q.
        v: [B, H, Nk, Dv], 1 <= Dv <= 256, the dtype of q.
        feature_map: phi, element by element: "elu" (elu(x) + 1 without cancellation: exp(min(x, 0)) + max(x, 0)),
            "relu", "squared_relu" or "identity". With "identity" the weights have either sign and need not sum to
            anything far from 0: ``normalize=False`` is what fits it.
        causal: row i sees the keys 0..i; needs Nq = Nk.
        normalize: False divides by the number of keys that row i sees (Nk; less where masked or causal) in place of the
            sum of the weights: a mean that neither padding nor later positions can change.
        key_padding_mask: bool [B, Nk], True = keep. What is not kept has no influence, whatever it holds, NaN included,
            and gets the gradient 0.
        eps: added to the sum of the weights, >= 0; unused if not normalised.

    Returns:
        [B, H, Nq, Dv] in the dtype of q; sums are float32, for float64 float64. A row that sees nothing, or whose
        denominator is 0 (or so small that its reciprocal overflows), gives zeros, and so are its gradients.
        Differentiable to every order in q, k and v, in reverse and forward mode; the first and second derivatives, and
        forward over reverse, have kernels of their own, linear in time and memory, and only inputs are kept for them.
        Higher ones go through the definition, which is quadratic. Under autocast q, k and v are cast as
        torch.nn.functional.scaled_dot_product_attention casts them.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    q, k, v = checked(q, k, v, causal, key_padding_mask)
    _check.integer("q.shape[2] (Nq)", q.shape[2], 1, MAX_POSITIONS)
    _check.integer("k.shape[2] (Nk)", k.shape[2], 1, MAX_POSITIONS)
    _check.integer("q.shape[3] (D)", q.shape[3], 1, MAX_WIDTH)
    _check.integer("v.shape[3] (Dv)", v.shape[3], 1, MAX_WIDTH)
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map: got {feature_map!r}, takes one of {', '.join(FEATURE_MAPS)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, takes a finite number >= 0")
    return _operator(q, k, v, feature_map, bool(causal), bool(normalize), key_padding_mask, float(eps))


def checked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, key_padding_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v that fit each other and the masks, cast as autocast wants them. TypeError, ValueError: they do not."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        _check.float_tensor(name, value)
        if value.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, takes [B, H, N, width]")
    q, k, v = _autocast(q, k, v)
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    for name, value, shape in (("k", k, (batch, heads, keys, width)), ("v", v, (batch, heads, keys, v.shape[3]))):
        if value.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, takes {tuple(shape)} for these q and k")
        if value.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {value.dtype}, takes that of q, {q.dtype}")
        if value.device != q.device:
            raise ValueError(f"{name}: got device {value.device}, takes that of q, {q.device}")
    if causal and rows != keys:
        raise ValueError(f"causal: got {rows} rows and {keys} keys, takes as many of both")
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, (batch, keys), q.device)
    return q, k, v


def _check_mask(mask, shape, device):
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"key_padding_mask: got {type(mask).__name__}, takes a tensor or None")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: got dtype {mask.dtype}, takes bool (True = keep)")
    if mask.shape != shape:
        raise ValueError(f"key_padding_mask: got shape {tuple(mask.shape)}, takes [B, Nk] = {tuple(shape)}")
    if mask.device != device:
        raise ValueError(f"key_padding_mask: got device {mask.device}, takes that of q, {device}")


def _autocast(*tensors):
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _empty_like(x, width):
    """[B, H, N, width], laid out as x: heads inside of positions where x has them so, as transformers do."""
    batch, heads, positions, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, positions, heads, width)).transpose(1, 2)
    return x.new_empty((batch, heads, positions, width))


def _fake(q, k, v, *settings):
    return _empty_like(q, v.shape[3])


def _fake_gradients(grad, q, k, v, *settings):
    return tuple(_empty_like(x, x.shape[3]) for x in (q, k, v))


def _fake_second_gradients(u_q, u_k, u_v, grad, q, k, v, *settings):
    return tuple(_empty_like(x, x.shape[3]) for x in (grad, q, k, v))


def _for_cpu(*args):
    """Arguments of the C++ kernels: any strides but the last, which must be 1."""
    *tensors, feature_map, causal, normalize, key_padding_mask, eps = args
    rows = (x if x.stride(3) == 1 else x.contiguous() for x in tensors)
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    return *rows, mask, FEATURE_MAPS.index(feature_map), causal, normalize, eps


def _cpu(*args, out):
    torch.ops.robattr_fast_C.linear_attention(out, *_for_cpu(*args))


def _cpu_backward(*args, out):
    torch.ops.robattr_fast_C.linear_attention_backward(*out, *_for_cpu(*args))


def _cpu_double_backward(*args, out):
    torch.ops.robattr_fast_C.linear_attention_double_backward(*out, *_for_cpu(*args))


def _triton(*args, out):
    from robattr_fast.kernels import linear_attention as kernels

    kernels.linear_attention(out, *args)


def _triton_backward(*args, out):
    from robattr_fast.kernels import linear_attention as kernels

    kernels.linear_attention_backward(*out, *args)


def _triton_double_backward(*args, out):
    from robattr_fast.kernels import linear_attention as kernels

    kernels.linear_attention_double_backward(*out, *args)


def _setup(ctx, inputs, output):
    *tensors, ctx.feature_map, ctx.causal, ctx.normalize, mask, ctx.eps = inputs
    ctx.save_for_backward(*tensors, mask)


def _saved(ctx):
    """The tensors that were differentiated, and the settings in the order of the schema."""
    *tensors, mask = ctx.saved_tensors
    return tensors, (ctx.feature_map, ctx.causal, ctx.normalize, mask, ctx.eps)


def _backward(ctx, grad):
    tensors, settings = _saved(ctx)
    return torch.ops.robattr_fast.linear_attention_backward(grad, *tensors, *settings)


def _jvp(ctx, t_q, t_k, t_v, *_):
    # The first result of the double backward is the derivative of the forward in a direction, whatever its gradient.
    (q, k, v), settings = _saved(ctx)
    grad = torch.zeros_like(_fake(q, k, v))
    return torch.ops.robattr_fast.linear_attention_double_backward(t_q, t_k, t_v, grad, q, k, v, *settings)[0]


def _double_backward(ctx, *grads):
    tensors, settings = _saved(ctx)
    return torch.ops.robattr_fast.linear_attention_double_backward(*grads, *tensors, *settings)


def _backward_jvp(ctx, t_grad, t_q, t_k, t_v, *_):
    # Linear in grad; and the derivative of a gradient is a Hessian, which is symmetric.
    (grad, q, k, v), settings = _saved(ctx)
    through_grad = torch.ops.robattr_fast.linear_attention_backward(t_grad, q, k, v, *settings)
    _, *through_tensors = torch.ops.robattr_fast.linear_attention_double_backward(
        t_q, t_k, t_v, grad, q, k, v, *settings
    )
    return tuple(a + b for a, b in zip(through_grad, through_tensors, strict=True))


def _triple_backward(ctx, *grads):
    tensors, (feature_map, causal, normalize, mask, eps) = _saved(ctx)

    def define(*tensors):
        return definition_of_double_backward(
            *tensors, feature_map=feature_map, causal=causal, normalize=normalize, key_padding_mask=mask, eps=eps
        )

    if torch._C._are_functorch_transforms_active():
        return torch.func.vjp(define, *tensors)[1](grads)
    # As torch.func does it, which knows no hooks for saved tensors.
    with torch.enable_grad():
        # Views, because one tensor may be several arguments, and each has its own gradient.
        inputs = [x.view_as(x) for x in tensors]
        outputs = define(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    reached = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in reached],
        wanted,
        [grad for _, grad in reached],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    gradients = iter(found)
    return tuple(next(gradients) if x.requires_grad else None for x in inputs)


_operator = register(
    "linear_attention",
    definition,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup=_setup,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap.folded("linear_attention"),
)
register(
    "linear_attention_backward",
    definition_of_backward,
    fake=_fake_gradients,
    cpu=_cpu_backward,
    triton=_triton_backward,
    setup=_setup,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=_vmap.folded("linear_attention_backward"),
)
register(
    "linear_attention_double_backward",
    definition_of_double_backward,
    fake=_fake_second_gradients,
    cpu=_cpu_double_backward,
    triton=_triton_double_backward,
    setup=_setup,
    backward=_triple_backward,
    vmap=_vmap.folded("linear_attention_double_backward"),
)
