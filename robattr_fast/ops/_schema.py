"""All operator schemas. They exist whether or not the extension does; C++ and Python only register implementations.

``robattr_fast::X`` is what users and torch.compile see; its implementations are Python functions that check, choose a
backend and allocate. ``robattr_fast_C::X`` is one C++ kernel; it writes into tensors it is given.
"""

from __future__ import annotations

from torch.library import Library

# int64 seeds carry an unsigned 64-bit value in two's complement.
_PUBLIC = (
    "noisy_samples(Tensor x, float sigma, SymInt num_samples, int seed, SymInt first_sample, Tensor? image_ids, "
    "Tensor? sample_offset, ScalarType? dtype, bool channels_last, bool fast=False) -> Tensor",
    "packed_gram(Tensor rows, int num_levels, Tensor? other, Tensor? mask) -> Tensor",
    "topk_threshold(Tensor scores, SymInt k) -> Tensor",
    "sparsify(Tensor scores, float tau, float gamma, int? levels) -> Tensor",
    "soft_topk(Tensor scores, SymInt k, float temperature) -> (Tensor, Tensor, Tensor)",
    "count_sparsified_(Tensor(a!) counts, Tensor scores, float tau, float gamma, Tensor(b!)? packed) -> Tensor",
    "mlp_smoothgrad(Tensor(a!) counts, Tensor x, Tensor[] weights, Tensor[] biases, float sigma, SymInt num_samples, "
    "float tau, float gamma, str activation, Tensor? target, int seed, SymInt first_sample, Tensor? image_ids, "
    "Tensor? sample_offset, Tensor(b!)? packed) -> Tensor",
    "betting_bounds(Tensor counts, Tensor samples, float delta) -> (Tensor, Tensor)",
    "linear_attention(Tensor q, Tensor k, Tensor v, str feature_map, bool causal, bool normalize, "
    "Tensor? key_padding_mask, float eps) -> Tensor",
)

# What only the autograd of a public operator calls; X_backward and X_double_backward live in X's files.
_DERIVATIVES = (
    "linear_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, str feature_map, bool causal, "
    "bool normalize, Tensor? key_padding_mask, float eps) -> (Tensor, Tensor, Tensor)",
    "linear_attention_double_backward(Tensor u_q, Tensor u_k, Tensor u_v, Tensor grad, Tensor q, Tensor k, Tensor v, "
    "str feature_map, bool causal, bool normalize, Tensor? key_padding_mask, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)

_KERNELS = (
    "noisy_samples(Tensor(a!) out, Tensor x, float sigma, int seed, int first_sample, Tensor image_ids) -> ()",
    "packed_gram(Tensor(a!) out, Tensor rows, Tensor other, Tensor? mask, int num_levels, bool symmetric) -> ()",
    "topk_threshold(Tensor(a!) out, Tensor scores, int k) -> ()",
    "sparsify(Tensor(a!) out, Tensor scores, int k_tau, int k_gamma, int levels) -> ()",
    "soft_topk(Tensor(a!) out, Tensor(b!) pivot, Tensor(c!) offset, Tensor scores, int k, float temperature) -> ()",
    "count_sparsified_(Tensor(a!) counts, Tensor(b!) invalid, Tensor(c!)? packed, Tensor scores, int k_tau, "
    "int k_gamma) -> bool",
    "betting_bounds(Tensor(a!) lower, Tensor(b!) upper, Tensor counts, Tensor samples, Tensor shares, "
    "float log_inverse_delta) -> ()",
    "linear_attention(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor? mask, int feature_map, bool causal, "
    "bool normalize, float eps) -> ()",
    "linear_attention_backward(Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor grad, Tensor q, "
    "Tensor k, Tensor v, Tensor? mask, int feature_map, bool causal, bool normalize, float eps) -> ()",
    "linear_attention_double_backward(Tensor(a!) of_grad, Tensor(b!) of_q, Tensor(c!) of_k, Tensor(d!) of_v, "
    "Tensor u_q, Tensor u_k, Tensor u_v, Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, int feature_map, "
    "bool causal, bool normalize, float eps) -> ()",
)

PUBLIC = Library("robattr_fast", "DEF")
KERNELS = Library("robattr_fast_C", "DEF")

for _schema in _PUBLIC + _DERIVATIVES:
    PUBLIC.define(_schema)
for _schema in _KERNELS:
    KERNELS.define(_schema)
