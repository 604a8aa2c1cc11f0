"""Kernel attention as modules: against plain formulas, torch's own conventions, and itself swapped into models."""

import copy
import math

import pytest
import torch
from _attention_models import Attention, TinyViT, interpretation_regularized
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import robattr_fast as rf
from robattr_fast.nn import (
    KERNELS,
    KernelAttention,
    KernelSelfAttention,
    attention_entropy,
    attention_maps,
    kernel_attention,
    kernel_weights,
    kernelize,
)

KERNEL_FORMS = [(kernel, normalize) for kernel in KERNELS for normalize in (True, False)]


def phi(x, kernel):
    return nn.functional.elu(x) + 1 if kernel == "elu" else x.relu()


def naive_weights(q, k, kernel, normalize, causal=False, keep=None):
    """Weights pair by pair in float64; eps of the linear kernels is 1e-6."""
    q, k = q.double(), k.double()
    if kernel == "gaussian":
        weights = torch.exp(-(q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) / (2 * math.sqrt(q.shape[-1])))
    else:
        weights = (phi(q, kernel)[..., :, None, :] * phi(k, kernel)[..., None, :, :]).sum(-1)
    visible = torch.ones(weights.shape, dtype=torch.bool)
    if causal:
        visible &= torch.ones(weights.shape[-2:], dtype=torch.bool).tril()
    if keep is not None:
        visible &= keep[:, None, None, :]
    weights = torch.where(visible, weights, 0)
    total = weights.sum(-1, keepdim=True) if normalize else visible.sum(-1, keepdim=True).double()
    if normalize and kernel != "gaussian":
        total = torch.where(total > 0, total + 1e-6, 0)
    return torch.where(total > 0, weights / total.where(total > 0, torch.ones(())), 0)


def inputs(rows=5, keys=7, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 3, rows, width), (2, 3, keys, width), (2, 3, keys, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("mask", [None, "causal", "padding", "both"])
@pytest.mark.parametrize(("kernel", "normalize"), KERNEL_FORMS)
def test_attention_is_the_plain_formula(kernel, normalize, mask):
    q, k, v = inputs(rows=7) if mask in ("causal", "both") else inputs()
    keep = torch.tensor([[1, 1, 1, 0, 1, 0, 0], [1] * 7], dtype=torch.bool) if mask in ("padding", "both") else None
    causal = mask in ("causal", "both")
    masks = {"causal": causal, "key_padding_mask": keep}
    expected = naive_weights(q, k, kernel, normalize, causal, keep)
    weights = kernel_weights(q, k, kernel=kernel, normalize=normalize, **masks)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    out = kernel_attention(q, k, v, kernel=kernel, normalize=normalize, **masks)
    torch.testing.assert_close(out, weights @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "normalize"), KERNEL_FORMS)
def test_second_derivatives(kernel, normalize):
    tensors = [x[:1, :1, :3].clone().requires_grad_() for x in inputs(3, 3, 2)]
    keep = torch.tensor([[True, True, False]])

    def f(q, k, v):
        return kernel_attention(q, k, v, kernel=kernel, normalize=normalize, key_padding_mask=keep)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_gaussian_weights_lose_no_digits_far_from_the_origin(normalize, padded):
    q, k, _ = (x + 1000 for x in inputs(dtype=torch.float32))
    keep = torch.tensor([[True] * 4 + [False] * 3] * 2) if padded else torch.ones(2, 7, dtype=torch.bool)
    weights = kernel_weights(q, k, kernel="gaussian", normalize=normalize, key_padding_mask=keep if padded else None)
    expected = naive_weights(q, k, "gaussian", normalize, keep=keep)
    # Of a squared distance: D roundings of each inner product, 2 of their sum, 3 of q - c and k - c, 1 of the division.
    seen = k[:, :, keep[0]].double()
    centre = seen.mean(2, keepdim=True)
    reach = (q - centre).norm(dim=-1).max() + (seen - centre).norm(dim=-1).max()
    unit, width = 2**-24, q.shape[-1]
    exponent = (width + 6) * unit * reach.square() / (2 * math.sqrt(width))
    # Of a weight and of the sum of 7 of them; then exp, sum and division.
    torch.testing.assert_close(weights.double(), expected, rtol=float(2 * exponent) + 12 * unit, atol=0)


def test_gaussian_weights_are_at_most_one():
    """Of a position to itself |q|^2 + |k|^2 - 2 q . k is 0 but for its rounding, of either sign."""
    x = 100 * torch.randn(1, 2, 50, 8)
    share = kernel_weights(x, x, kernel="gaussian", normalize=False) * 50
    assert float(share.max()) <= 1
    assert float(share.min()) >= 0


@pytest.mark.parametrize("normalize", [True, False])
def test_second_derivatives_of_gaussian_attention_where_distances_are_zero(normalize):
    _, x, v = inputs()
    tensors = [x.clone().requires_grad_(), x.clone().requires_grad_(), v.requires_grad_()]
    x = x - x.mean(dim=2, keepdim=True)
    assert bool((2 * x.square().sum(-1) < 2 * (x @ x.mT).diagonal(dim1=-2, dim2=-1)).any()), "no distance to clamp"

    def f(q, k, v):
        return kernel_attention(q, k, v, kernel="gaussian", normalize=normalize)

    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_gaussian_attention_is_finite_where_all_weights_underflow(normalize):
    q, k, v = inputs(dtype=torch.float32)
    q = (100 * q).requires_grad_()
    out = kernel_attention(q, k, v, kernel="gaussian", normalize=normalize)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), q)
    assert all(bool(t.isfinite().all()) for t in (out, gradient, second))


@pytest.mark.parametrize(("kernel", "normalize"), KERNEL_FORMS)
def test_padding_has_no_influence_whatever_it_holds(kernel, normalize):
    q, k, v = inputs()
    keep = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0] * 7], dtype=torch.bool)
    for x in (k, v):
        x[~keep[:, None, :].expand(x.shape[:3])] = torch.nan
    q.requires_grad_()
    k.requires_grad_()
    out = kernel_attention(q, k, v, kernel=kernel, normalize=normalize, key_padding_mask=keep)
    alone = kernel_attention(q[:1], k[:1, :, :4], v[:1, :, :4], kernel=kernel, normalize=normalize)
    torch.testing.assert_close(out[:1], alone, rtol=1e-12, atol=1e-12)
    assert bool((out[1] == 0).all()), "a row that sees nothing gives zeros"
    gradients = torch.autograd.grad(out.sum(), (q, k))
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_under_autocast(kernel):
    """As of scaled_dot_product_attention, q, k and v need not have one dtype: norms give float32, projections not."""
    q, k, v = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernel_attention(q, k.bfloat16(), v, kernel=kernel)
        weights = kernel_weights(q, k.bfloat16(), kernel=kernel)
    assert out.dtype == weights.dtype == torch.bfloat16
    expected = naive_weights(q, k, kernel, True)
    # bfloat16 has 8 bits: inputs, weights and output are rounded.
    torch.testing.assert_close(out.double(), expected @ v.double(), rtol=0, atol=4 * 2**-8)
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=4 * 2**-8)


def wide():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 1, n, 3, generator=generator) for n in (2, 300)]


def test_weights_of_more_keys_than_one_call_takes():
    q, k = wide()
    torch.testing.assert_close(kernel_weights(q, k), naive_weights(q, k, "elu", True).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel": "softmax"}, ValueError, "kernel: got 'softmax', takes one of elu, relu, gaussian"),
        ({"causal": True}, ValueError, "causal: got 5 rows and 7 keys"),
        ({"key_padding_mask": torch.ones(2, 7)}, (TypeError, ValueError), "key_padding_mask: got"),
        ({"v": torch.ones(2, 3, 6, 4, dtype=torch.float64)}, ValueError, "v: got shape"),
        ({"k": torch.ones(2, 3, 7, 6)}, TypeError, "k: got dtype torch.float32"),
        ({"q": torch.ones(3, 5, 6, dtype=torch.float64)}, ValueError, r"q: got shape \(3, 5, 6\)"),
    ],
)
@pytest.mark.parametrize("kernel", ["elu", "gaussian"])
def test_bad_arguments(kernel, change, error, message):
    q, k, v = inputs()
    with pytest.raises(error, match=message):
        kernel_attention(**({"q": q, "k": k, "v": v, "kernel": kernel} | change))


# --- torch.nn.MultiheadAttention


def mha(**settings):
    torch.manual_seed(1)
    return nn.MultiheadAttention(12, 3, **({"batch_first": True} | settings)).eval()


@pytest.mark.parametrize("settings", [{}, {"kdim": 5, "vdim": 7}, {"bias": False}, {"batch_first": False}])
def test_projections_are_those_of_torch(settings, monkeypatch):
    """With softmax attention put in place of the kernel, the module is torch's: only the kernel is ours."""
    from robattr_fast.nn import attention as module

    softmax = mha(**settings)
    ours = KernelAttention.from_softmax(softmax)
    query, key, value = torch.randn(2, 4, 12), torch.randn(2, 6, softmax.kdim), torch.randn(2, 6, softmax.vdim)
    ignore = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    if not softmax.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))

    def weights(q, k, *, key_padding_mask, **_):
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        return logits.masked_fill(~key_padding_mask[:, None, None], -torch.inf).softmax(-1)

    monkeypatch.setattr(module, "kernel_weights", weights)
    monkeypatch.setattr(module, "kernel_attention", lambda q, k, v, **masks: weights(q, k, **masks) @ v)
    for average in (True, False):
        arguments = {"key_padding_mask": ignore, "average_attn_weights": average}
        for got, expected in zip(
            ours(query, key, value, **arguments), softmax(query, key, value, **arguments), strict=True
        ):
            torch.testing.assert_close(got, expected)
    assert ours(query, key, value, key_padding_mask=ignore, need_weights=False)[1] is None


def test_parameters_are_shared_and_states_interchangeable():
    softmax = mha()
    ours = KernelAttention.from_softmax(softmax)
    assert {n: id(p) for n, p in ours.named_parameters()} == {n: id(p) for n, p in softmax.named_parameters()}
    fresh = KernelAttention(12, 3, batch_first=True)
    assert not torch.equal(fresh.in_proj_weight, ours.in_proj_weight)
    fresh.load_state_dict(softmax.state_dict())
    x = torch.randn(2, 4, 12)
    torch.testing.assert_close(fresh.eval()(x, x, x)[0], ours(x, x, x)[0], rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(ours)(x, x, x)[0], ours(x, x, x)[0], rtol=0, atol=0)


def test_torch_mask_means_ignore():
    ours = KernelAttention.from_softmax(mha())
    x = torch.randn(1, 5, 12)
    ignore = torch.tensor([[False, False, False, True, True]])
    expected = ours(x, x[:, :3], x[:, :3])[0]
    torch.testing.assert_close(ours(x, x, x, key_padding_mask=ignore)[0], expected)
    additive = torch.zeros(1, 5).masked_fill(ignore, -torch.inf)
    torch.testing.assert_close(ours(x, x, x, key_padding_mask=additive)[0], expected)
    with pytest.raises(ValueError, match="other values than 0"):
        ours(x, x, x, key_padding_mask=torch.full((1, 5), -1.0))


def test_float_masks_break_no_graph():
    ours = KernelAttention.from_softmax(mha())
    x = torch.randn(1, 5, 12)
    additive = torch.tensor([[0.0, 0.0, 0.0, -torch.inf, -torch.inf]])
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x, x, x, key_padding_mask=additive)[0], ours(x, x, x, key_padding_mask=additive)[0]
    )


def test_causal_and_unbatched():
    ours = KernelAttention.from_softmax(mha())
    x = torch.randn(2, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    out, weights = ours(x, x, x, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(out[:, :3], ours(x[:, :3], x[:, :3], x[:, :3], is_causal=True)[0])
    assert bool((weights.triu(1) == 0).all())
    one, its_weights = ours(x[0], x[0], x[0], is_causal=True)
    torch.testing.assert_close(one, out[0])
    torch.testing.assert_close(its_weights, weights[0])


def test_what_kernel_attention_does_not_have_is_refused():
    x = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match="add_bias_kv: got True"):
        KernelAttention(12, 3, add_bias_kv=True)
    with pytest.raises(ValueError, match="kernel: got 'cosine'"):
        KernelAttention(12, 3, kernel="cosine")
    with pytest.raises(ValueError, match="attn_mask: got shape"):
        KernelAttention(12, 3, batch_first=True)(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"dropout: got 0.1 in training"):
        KernelAttention(12, 3, dropout=0.1, batch_first=True)(x, x, x)
    KernelAttention(12, 3, dropout=0.1, batch_first=True).eval()(x, x, x)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with pytest.raises(ValueError, match="nested"):
        KernelAttention(12, 3, batch_first=True)(nested, nested, nested)


# --- timm's Attention


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "gated": True}])
@pytest.mark.parametrize(("kernel", "normalize"), KERNEL_FORMS)
def test_timm_form_keeps_its_projections(settings, kernel, normalize):
    softmax = Attention(12, 3, **settings).eval()
    ours = KernelSelfAttention.from_softmax(softmax, kernel=kernel, normalize=normalize)
    assert {n: id(p) for n, p in ours.named_parameters()} == {n: id(p) for n, p in softmax.named_parameters()}
    x = torch.randn(2, 5, 12)
    q, k, v = softmax.qkv(x).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = naive_weights(softmax.q_norm(q), softmax.k_norm(k), kernel, normalize).float()
    out = (weights @ v).transpose(1, 2).reshape(2, 5, 12)
    if softmax.gate is not None:
        out = out * softmax.gate(x).sigmoid()
    torch.testing.assert_close(ours(x), softmax.proj(out), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weights(x), weights, rtol=1e-4, atol=1e-5)


def test_timm_constructor_and_refusals():
    ours = KernelSelfAttention(12, 3, qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm)
    assert ours(torch.randn(2, 5, 12)).shape == (2, 5, 12)
    x = torch.randn(1, 4, 12)
    torch.testing.assert_close(ours(x, is_causal=True)[:, :2], ours(x[:, :2], is_causal=True))
    with pytest.raises(ValueError, match="attn_mask: got shape"):
        ours(x, attn_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="norm_layer: got None"):
        KernelSelfAttention(12, 3, qk_norm=True)
    with pytest.raises(ValueError, match="takes a multiple of num_heads=5"):
        KernelSelfAttention(12, 5)
    with pytest.raises(ValueError, match=r"dropout: got 0.2"):
        KernelSelfAttention(12, 3, attn_drop=0.2)(x)


# --- kernelize


@pytest.mark.parametrize("form", ["torch", "timm"])
def test_kernelize_swaps_every_attention_and_keeps_the_weights(form):
    model = TinyViT(form).eval()
    x = torch.rand(3, 1, 8, 8)
    before = model(x).detach()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    attention = "blocks.layers.{}.self_attn" if form == "torch" else "blocks.{}.attn"
    was, now = ("MultiheadAttention", "KernelAttention") if form == "torch" else ("Attention", "KernelSelfAttention")
    assert kernelize(model, kernel="gaussian") == [(attention.format(i), was, now) for i in range(2)]
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert float((model(x) - before).detach().abs().max()) > 1e-4
    assert model.get_submodule(attention.format(1)).kernel == "gaussian"


def test_fused_paths_of_torch_do_not_bypass_the_kernel():
    """In eval mode without gradients torch's encoder reads the weights itself, and with padding nests its input."""
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    assert model.use_nested_tensor
    kernelize(model)
    x = torch.randn(2, 6, 12)
    ignore = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        fused = model(x, src_key_padding_mask=ignore)
        short = model(x[1:, :4])
    with_graph = model(x, src_key_padding_mask=ignore)
    torch.testing.assert_close(fused, with_graph, rtol=0, atol=0)
    torch.testing.assert_close(fused[1:, :4], short)


def test_shared_attention_is_swapped_in_every_place():
    attention = mha()
    model = nn.ModuleDict({"a": attention, "b": nn.ModuleList([attention])})
    assert len(kernelize(model)) == 1
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], KernelAttention)


class RelativeAttention(nn.Module):
    """Softmax attention with a bias per pair: not to be swapped silently."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(2, 4, 4))


class Derived(nn.MultiheadAttention):
    pass


def hooked():
    attention = mha()
    attention.register_forward_hook(lambda *_: None)
    return attention


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (RelativeAttention, "'1' is an attention that is not known .*has bias"),
        (lambda: Derived(12, 3), "Derived may do otherwise"),
        (lambda: nn.MultiheadAttention(12, 3, add_zero_attn=True), "add_zero_attn"),
        (hooked, "hooks"),
    ],
)
def test_kernelize_refuses_what_it_cannot_swap_and_changes_nothing(attention, reason):
    model = nn.Sequential(mha(), attention())
    with pytest.raises(rf.ModelError, match=reason):
        kernelize(model)
    assert not any(isinstance(m, KernelAttention) for m in model.modules())
    assert [s.name for s in kernelize(model, skip=["1"])] == ["0"]


def test_kernelize_refuses_a_model_without_attention():
    with pytest.raises(rf.ModelError, match="no softmax attention found"):
        kernelize(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(rf.ModelError, match="it is the model itself"):
        kernelize(mha())
    with pytest.raises(ValueError, match="skip: the model has no module 'x'"):
        kernelize(TinyViT(), skip=["x"])
    with pytest.raises(ValueError, match="kernel: got 'soft'"):
        kernelize(TinyViT(), kernel="soft")
    model = TinyViT()
    kernelize(model)
    with pytest.raises(rf.ModelError, match="no softmax attention found"):
        kernelize(model)


# --- maps and entropy


@pytest.mark.parametrize("form", ["torch", "timm"])
@pytest.mark.parametrize("kernel", [None, *KERNELS])
def test_maps_of_every_layer(form, kernel):
    model = TinyViT(form).eval()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention | Attention)]
    if kernel:
        kernelize(model, kernel=kernel)
    x = torch.rand(3, 1, 8, 8)
    expected = model(x)
    seen = {}
    handle = model.head.register_forward_hook(lambda *call: seen.update(logits=call[2]))
    maps = attention_maps(model, x)
    handle.remove()
    assert list(maps) == names
    torch.testing.assert_close(seen["logits"], expected)
    for weights in maps.values():
        assert weights.shape == (3, 2, 4, 4)
        total = weights.sum(-1)
        if kernel == "relu":  # rows may have no positive feature in common with any key, or next to none beside eps
            total = torch.where(total == 0, 1, total)
        torch.testing.assert_close(total, torch.ones(3, 2, 4), rtol=0, atol=1e-2 if kernel == "relu" else 1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(attention_maps(model, x), {n: w.detach() for n, w in maps.items()})


class Around(nn.Module):
    """A model that is one attention, called as the test says."""

    def __init__(self, attention, call=lambda attention, *args, **kwargs: attention(*args, **kwargs)):
        super().__init__()
        self.attention = attention
        self.call = call

    def forward(self, *args, **kwargs):
        self.result = self.call(self.attention, *args, **kwargs)
        return self.result


@pytest.mark.parametrize("kernel", [None, "elu"])
@pytest.mark.parametrize("asked", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_maps_leave_the_result_as_it_was_asked_for(kernel, asked):
    attention = mha()
    model = Around(attention if kernel is None else KernelAttention.from_softmax(attention, kernel=kernel)).eval()
    x = torch.randn(2, 5, 12)
    (weights,) = attention_maps(model, x, x, x, **asked).values()
    during = model.result
    torch.testing.assert_close(weights, model.attention(x, x, x, average_attn_weights=False)[1])
    for got, expected in zip(during, model(x, x, x, **asked), strict=True):
        torch.testing.assert_close(got, expected)


def test_maps_of_masked_timm_attention():
    attention = Attention(12, 3, qk_norm=True).eval()
    model = Around(attention).eval()
    x = torch.randn(2, 5, 12)
    keep = torch.tensor([True, True, True, False, False]).expand(2, 1, 5, 5)
    (masked,) = attention_maps(model, x, attn_mask=keep).values()
    assert bool((masked[..., 3:] == 0).all())
    (causal,) = attention_maps(model, x, is_causal=True).values()
    assert bool((causal.triu(1) == 0).all())
    value = attention.qkv(x).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)[2]
    torch.testing.assert_close(
        attention.proj((causal @ value).transpose(1, 2).reshape(2, 5, 12)), attention(x, is_causal=True)
    )


def test_maps_carry_the_graph():
    model = TinyViT().eval()
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    weights = list(attention_maps(model, x).values())[-1]
    (gradient,) = torch.autograd.grad(weights[0, 0, 0, 0], x)
    assert float(gradient.abs().max()) > 0


def test_maps_refuse():
    with pytest.raises(rf.ModelError, match="training mode"):
        attention_maps(TinyViT(), torch.rand(1, 1, 8, 8))
    with pytest.raises(rf.ModelError, match="no known attention ran"):
        attention_maps(nn.Linear(2, 2).eval(), torch.rand(1, 2))

    twice = Around(mha(), lambda attention, x: attention(attention(x, x, x)[0], x, x)).eval()
    with pytest.raises(rf.ModelError, match="'attention' runs more than once"):
        attention_maps(twice, torch.rand(1, 3, 12))


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 20.0])
def test_entropy_lies_between_its_bounds(spread):
    logits = spread * torch.rand(4, 2, 30, 17, dtype=torch.float64)
    value, lower, upper = attention_entropy(logits.softmax(-1))
    span = logits.amax(-1) - logits.amin(-1)
    torch.testing.assert_close(value, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(upper, torch.full_like(value, math.log(17)))
    torch.testing.assert_close(lower, (math.log(17) - span**2 / 8).clamp(min=0))
    assert bool((lower <= value + 1e-12).all())
    assert bool((value <= upper + 1e-12).all())


def test_entropy_bound_cannot_have_a_smaller_constant():
    """Half the logits at either end: log n - H approaches Delta^2 / 8 as Delta goes to 0."""
    logits = torch.tensor([0.0, 0.02] * 50, dtype=torch.float64)
    value, lower, upper = attention_entropy(logits.softmax(-1))
    assert 0.999 < float((upper - value) / (upper - lower)) <= 1


def test_entropy_of_masked_and_degenerate_rows():
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    keep = torch.tensor([True, True, False])
    value, lower, upper = attention_entropy(weights, keep)
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(value, torch.tensor([math.log(2), 0.0, quarter, 0.0]))
    torch.testing.assert_close(upper, torch.full((4,), math.log(2)))
    torch.testing.assert_close(lower, torch.tensor([math.log(2), 0.0, math.log(2) - math.log(3) ** 2 / 8, 0.0]))
    with pytest.raises(ValueError, match="negative or non-finite"):
        attention_entropy(torch.tensor([1.0, -0.1]))
    with pytest.raises(TypeError, match=r"keep: got dtype torch.float32"):
        attention_entropy(weights, keep.float())


@pytest.mark.parametrize("form", ["torch", "timm"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpretation_regularization_reaches_every_parameter(form, kernel):
    """The loss needs the input gradient's gradient: refused by the fused softmax, given by kernel attention."""
    model = TinyViT(form)
    x, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="derivative"):
        interpretation_regularized(model, x, labels, torch.rand_like(x)).backward()
    model.zero_grad()
    kernelize(model, kernel=kernel)
    interpretation_regularized(model, x, labels, torch.rand_like(x)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.abs().max()) > 0, name
