"""transformers: attention that differentiates twice, under a name that models take as ``attn_implementation``.

    from robattr_fast.integrations import transformers
    transformers.register()
    model = ViTForImageClassification(ViTConfig(attn_implementation="robattr_linear"))

The default implementation (sdpa) of transformers cannot be differentiated twice.
"""

from robattr_fast.nn.interface import register

__all__ = ["register"]
