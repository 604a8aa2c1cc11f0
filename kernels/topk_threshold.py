"""The exact k-th largest score of each row; definition: robattr_fast/reference/topk_threshold.py."""

import torch

from robattr_fast.kernels._select import as_rows, kth_largest


def topk_threshold(scores: torch.Tensor, out: torch.Tensor, k: int) -> None:
    """Fill out [...] (contiguous; float64 for float64 scores, else float32) from scores [..., n]."""
    kth_largest(as_rows(scores), out.view(-1), k)
