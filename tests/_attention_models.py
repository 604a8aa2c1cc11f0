"""Small attention modules and transformers that the tests of nn and of the integrations swap and explain."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Softmax self-attention in the form that timm's and its relatives have."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.gate = nn.Linear(dim, dim) if gated else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None, is_causal=False):
        batch, n, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale
        )
        out = self.norm(out.transpose(1, 2).reshape(batch, n, dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, **settings: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, **settings)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """[B, 1, 8, 8] -> logits [B, 3]: four patches of 4x4, mean-pooled; attention in torch's or in timm's form."""

    def __init__(self, form: str = "torch", dim: int = 16, heads: int = 2, **settings: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, 4, stride=4)
        if form == "torch":
            layer = nn.TransformerEncoderLayer(
                dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.blocks = nn.Sequential(*(Block(dim, heads, **settings) for _ in range(2)))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(dim=1))


def interpretation_regularized(model, x, labels, target_map, align=0.5, small=0.1):
    """Cross-entropy + align (1 - cos(target map, input gradient)) + small |input gradient|: Noack et al. 2021."""
    x = x.clone().requires_grad_()
    logits = model(x)
    logits = getattr(logits, "logits", logits)
    loss = F.cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), x, create_graph=True)
    cosine = F.cosine_similarity(gradient.flatten(1), target_map.flatten(1), dim=1)
    return loss + align * (1 - cosine).mean() + small * gradient.flatten(1).norm(dim=1).mean()
