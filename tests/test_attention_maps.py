"""`attention_maps` beside the model: the forward is the one that runs without, the weights those of torch."""

import copy

import pytest
import torch
from _attention_models import Attention
from torch import nn

from robattr_fast.errors import ModelError
from robattr_fast.nn import attention_maps, kernelize, maps_and_gradients
from robattr_fast.nn.attention import projected

B, H, ROWS, KEYS, WIDTH = 2, 2, 5, 7, 8


class Calls(nn.Module):
    """A model that is one attention; keeps what it returned."""

    def __init__(self, attention, **arguments):
        super().__init__()
        self.attention = attention
        self.arguments = arguments
        self.eval()

    def forward(self, *inputs):
        self.result = self.attention(*inputs, **self.arguments)
        return self.result


def boolean_mask(rows=ROWS, keys=KEYS):
    mask = torch.rand(rows, keys, generator=torch.Generator().manual_seed(4)) < 0.4
    mask[:, 0] = False
    return mask


def padding():
    ignored = torch.zeros(B, KEYS, dtype=torch.bool)
    ignored[0, :3] = True
    return ignored


def as_float(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


MASKS = {
    "none": {},
    "bool mask": {"attn_mask": boolean_mask()},
    "float mask": {"attn_mask": torch.rand(ROWS, KEYS)},
    "mask of each head": {"attn_mask": torch.stack([boolean_mask(), ~boolean_mask()]).repeat(B, 1, 1)},
    "bool padding": {"key_padding_mask": padding()},
    "float padding": {"key_padding_mask": as_float(padding())},
    "both": {"attn_mask": as_float(boolean_mask()), "key_padding_mask": as_float(padding())},
    "rows that see nothing": {"attn_mask": boolean_mask() | (torch.arange(ROWS) < 2)[:, None]},
}
FORMS = {
    "plain": {},
    "positions first": {"batch_first": False},
    "other widths": {"kdim": 3, "vdim": 6},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_multihead_attention_under_every_mask(form, mask):
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(WIDTH, H, **({"batch_first": True} | FORMS[form]))
    query, key, value = (
        torch.rand(B, n, width) for n, width in ((ROWS, WIDTH), (KEYS, attention.kdim), (KEYS, attention.vdim))
    )
    if not attention.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    model = Calls(attention, need_weights=False, **MASKS[mask])
    expected = model(query, key, value)[0]
    (maps,) = attention_maps(model, query, key, value).values()
    assert torch.equal(model.result[0], expected), "asking for weights has changed the forward"
    assert model.result[1] is None
    theirs = attention(query, key, value, average_attn_weights=False, **MASKS[mask])[1]
    # Where no key is seen torch's own weights are NaN, and its forward without weights has zeros.
    blind = theirs.isnan().all(-1, keepdim=True)
    assert bool(blind.any()) or mask != "rows that see nothing" or form == "extra keys"
    torch.testing.assert_close(maps, theirs.masked_fill(blind, 0))


def test_gradients_of_rows_that_see_nothing_are_zero():
    model = Calls(nn.MultiheadAttention(WIDTH, H, batch_first=True), **MASKS["rows that see nothing"])
    query, key = torch.rand(B, ROWS, WIDTH, requires_grad=True), torch.rand(B, KEYS, WIDTH)
    (maps,) = attention_maps(model, query, key, key).values()
    (gradient,) = torch.autograd.grad(maps.square().sum(), query)
    assert not gradient[:, :2].any()
    assert gradient[:, 2:].isfinite().all()
    assert gradient[:, 2:].any()


@pytest.mark.parametrize("kernel", [None, "elu", "relu", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_causal_encoder_on_a_left_padded_batch(kernel, dtype):
    """Its first rows see no key at all, in any layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).to(dtype).eval()
    causal = torch.ones(6, 6).triu(1).bool()
    if kernel:
        kernelize(model, kernel=kernel)
    x, ignored = torch.rand(2, 6, 16, dtype=dtype), torch.zeros(2, 6, dtype=torch.bool)
    ignored[0, :2] = True
    arguments = {"mask": causal, "src_key_padding_mask": ignored, "is_causal": True}
    seen = []
    handle = model.layers[2].register_forward_hook(lambda module, args, out: seen.append(out))
    expected = model(x, **arguments)
    maps = attention_maps(model, x, **arguments)
    handle.remove()
    assert torch.equal(seen[1], expected)
    for name, weights in maps.items():
        assert not weights[0, :, :2].any(), name
        assert weights[0, :, 2:, :2].eq(0).all(), name
        assert weights.isfinite().all(), name
        if kernel != "relu":  # whose rows may have no feature in common with any key
            total = weights[0, :, 2:].sum(-1).double()
            # Six rounded weights; "elu" divides by their sum and 1e-6.
            eps = 6 * torch.finfo(dtype).eps + 1e-5 * (kernel == "elu")
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=eps)


def test_timm_attention_whose_first_rows_see_nothing():
    model = Calls(Attention(WIDTH, H), attn_mask=~MASKS["rows that see nothing"]["attn_mask"][:, :ROWS][None, None])
    x = torch.rand(B, ROWS, WIDTH)
    expected = model(x)
    (maps,) = attention_maps(model, x).values()
    assert torch.equal(model.result, expected)
    assert expected.isfinite().all()
    assert not maps[:, :, :2].any()
    torch.testing.assert_close(maps[:, :, 2:].sum(-1), torch.ones(B, H, ROWS - 2))


def test_the_users_hooks_see_the_call_as_it_was_made():
    attention = nn.MultiheadAttention(WIDTH, H, batch_first=True)
    seen = []
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    attention.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    model = Calls(attention, need_weights=False)
    x = torch.rand(B, ROWS, WIDTH)
    attention_maps(model, x, x, x)
    assert seen == [{"need_weights": False}, None]


@pytest.mark.parametrize("unbatched", [False, True])
def test_under_autocast_and_without_a_batch(unbatched):
    attention = nn.MultiheadAttention(WIDTH, H, batch_first=True)
    model, x = Calls(attention, need_weights=False), torch.rand(B, ROWS, WIDTH)
    x = x[0] if unbatched else x
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, x, x)[0]
        (maps,) = attention_maps(model, x, x, x).values()
    assert torch.equal(model.result[0], expected)
    assert maps.dtype == torch.bfloat16
    exact = attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(maps.float(), exact.view(maps.shape), rtol=0, atol=2**-6)


def test_a_copy_of_a_kernelized_model_has_the_same_maps():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    kernelize(model)
    x = torch.rand(2, 6, 16)
    ours, copied = (attention_maps(m, x) for m in (model, copy.deepcopy(model)))
    for name, weights in ours.items():
        assert torch.equal(weights, copied[name])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_maps_where_rows_see_nothing(form):
    """Against attention written out, with weights that can be differentiated."""
    torch.manual_seed(1)
    width = {name: WIDTH for name in ("kdim", "vdim") if name in FORMS[form]}
    attention = nn.MultiheadAttention(WIDTH, H, **({"batch_first": True} | FORMS[form] | width)).double()
    mask = MASKS["rows that see nothing"]["attn_mask"][:, :ROWS]

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    x = torch.rand(B, ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(B, ROWS, WIDTH, dtype=torch.float64)
    x, weight = (x, weight) if attention.batch_first else (x.transpose(0, 1), weight.transpose(0, 1))
    if form == "extra keys":
        with pytest.raises(ModelError, match="no token"):
            maps_and_gradients(Self().eval(), x, lambda out: out * weight)
        return
    maps, gradients = maps_and_gradients(Self().eval(), x, lambda out: out * weight)
    (a,), (found,) = (list(each.values()) for each in (maps, gradients))
    _, _, v = projected(attention, *[x if attention.batch_first else x.transpose(0, 1)] * 3)
    a = a.detach().requires_grad_()
    out = attention.out_proj((a @ v).transpose(1, 2).flatten(2))
    (expected,) = torch.autograd.grad((out * (weight if attention.batch_first else weight.transpose(0, 1))).sum(), a)
    torch.testing.assert_close(found, expected)
    assert found.isfinite().all()
