"""The user's model made safe to explain, and known again: a private copy, its gradients, its identity."""

from robattr_fast.model.gradient import (
    AUTOCAST,
    EXPLANATIONS,
    Explanation,
    autocast,
    check_fixed,
    check_repeatable,
    checked_logits,
    dtype_name,
    dtype_named,
    forward,
    input_gradient,
    is_out_of_memory,
    scores,
    selected_logits,
)
from robattr_fast.model.identity import explanation_name, fingerprint, input_hash, is_identified, values_hash
from robattr_fast.model.private import batch_sizes, check_mode, private_copy

__all__ = [
    "AUTOCAST",
    "EXPLANATIONS",
    "Explanation",
    "autocast",
    "batch_sizes",
    "check_fixed",
    "check_mode",
    "check_repeatable",
    "checked_logits",
    "dtype_name",
    "dtype_named",
    "explanation_name",
    "fingerprint",
    "forward",
    "input_gradient",
    "input_hash",
    "is_identified",
    "is_out_of_memory",
    "private_copy",
    "scores",
    "selected_logits",
    "values_hash",
]
