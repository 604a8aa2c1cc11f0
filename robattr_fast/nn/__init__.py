"""Attention that differentiates twice, the swap that puts it into a model, and its maps and their entropy."""

from robattr_fast.nn.attention import KernelAttention, KernelSelfAttention
from robattr_fast.nn.entropy import Entropy, attention_entropy
from robattr_fast.nn.functional import KERNELS, kernel_attention, kernel_weights
from robattr_fast.nn.kernelize import Swapped, kernelize
from robattr_fast.nn.map_gradients import maps_and_gradients
from robattr_fast.nn.maps import attention_maps
from robattr_fast.nn.rollout import gradient_rollout, rollout

__all__ = [
    "KERNELS",
    "Entropy",
    "KernelAttention",
    "KernelSelfAttention",
    "Swapped",
    "attention_entropy",
    "attention_maps",
    "gradient_rollout",
    "kernel_attention",
    "kernel_weights",
    "kernelize",
    "maps_and_gradients",
    "rollout",
]
