"""timm: its vision transformers on kernel attention, and the swap of one that was made with softmax."""

import importlib
import sys

import pytest
import torch

from robattr_fast.integrations import timm as integration
from robattr_fast.nn import KernelSelfAttention, attention_maps, kernelize


@pytest.fixture
def timm():
    # RuntimeError, where torchvision was built for another torch.
    try:
        return importlib.import_module("timm")
    except Exception as error:
        pytest.skip(f"timm does not import here: {type(error).__name__}: {error}")


SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}])
def test_attention_layer_by_name(timm, settings):
    from timm.models.vision_transformer import VisionTransformer

    name = integration.register()
    assert name == "robattr_linear"
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL, attn_layer=name, **settings).eval()
    assert all(isinstance(block.attn, KernelSelfAttention) for block in model.blocks)
    softmax = VisionTransformer(**SMALL, **settings).eval()
    softmax.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert len(kernelize(softmax)) == 2
    torch.testing.assert_close(softmax(x), model(x), rtol=0, atol=0)
    assert all(weights.shape == (2, 3, 5, 5) for weights in attention_maps(model, x).values())


def test_maps_are_what_timm_multiplies(timm):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(**SMALL).eval()
    seen = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda *call: seen.append(call[2]))
    maps = attention_maps(model, torch.rand(2, 3, 16, 16))
    for got, expected in zip(maps.values(), seen, strict=True):
        torch.testing.assert_close(got, expected)


def test_where_timm_does_not_import_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        integration.register()
    with pytest.raises(ValueError, match="kernel: got 'cosine'"):
        integration.register(kernel="cosine")
