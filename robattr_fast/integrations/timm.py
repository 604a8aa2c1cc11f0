"""timm: attention that differentiates twice, under a name that vision transformers take as ``attn_layer``.

from robattr_fast.integrations import timm as robattr_timm
robattr_timm.register()
model = timm.create_model("vit_tiny_patch16_224", attn_layer="robattr_linear")
"""

from __future__ import annotations

from typing import Any

from robattr_fast.nn import KernelSelfAttention
from robattr_fast.nn.functional import check_kernel
from robattr_fast.nn.interface import interface_name


def register(name: str | None = None, *, kernel: str = "elu", normalize: bool = True) -> str:
    """Add kernel attention to the attention layers of timm's vision transformers, for this process.

    Args:
        name: what to call it; None: "robattr_linear" for elu, normalised, else "robattr_{kernel}", with "_mean" if not
            normalised.
        kernel, normalize: see `kernel_attention`.

    Returns:
        The name.

    Raises:
        ImportError: timm does not import, or is older than its attention layers. ValueError: no such kernel.
    """
    name = name or interface_name(check_kernel(kernel), normalize)
    layers = _attention_layers()

    class Layer(KernelSelfAttention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, kernel=kernel, normalize=normalize, **kwargs)

    layers[name] = Layer
    return name


def _attention_layers() -> dict[str, type]:
    try:
        from timm.models.vision_transformer import ATTN_LAYERS
    except Exception as error:  # RuntimeError, where torchvision was built for another torch
        raise ImportError(
            "the timm integration needs timm >= 1.0.31 and the torchvision that fits this torch: pip install timm "
            f"({type(error).__name__}: {error})"
        ) from error
    return ATTN_LAYERS
