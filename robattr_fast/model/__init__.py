"""The user's model made safe to explain, and known again: a private copy, its gradients, its identity."""

from robattr_fast.model.checks import (
    GRADIENT,
    apart,
    check_fixed,
    check_repeatable,
    competing,
    gradients_apart,
    other_map,
)
from robattr_fast.model.gradient import (
    AUTOCAST,
    EXPLANATIONS,
    Explanation,
    autocast,
    dtype_name,
    dtype_named,
    forward,
    input_gradient,
    is_out_of_memory,
    scores,
    selected_logits,
)
from robattr_fast.model.hooks import has_hooks, unchanged
from robattr_fast.model.identity import (
    callable_fingerprint,
    explanation_name,
    fingerprint,
    first_fingerprint,
    input_hash,
    is_identified,
    other_model,
    values_hash,
)
from robattr_fast.model.output import check_classes, checked_logits, logits_in
from robattr_fast.model.private import batch_sizes, check_mode, private_copy, unwrapped
from robattr_fast.model.probe import behaviour, other_behaviour
from robattr_fast.model.surroundings import neutral, neutral_methods, users_defaults

__all__ = [
    "AUTOCAST",
    "EXPLANATIONS",
    "GRADIENT",
    "Explanation",
    "apart",
    "autocast",
    "batch_sizes",
    "behaviour",
    "callable_fingerprint",
    "check_classes",
    "check_fixed",
    "check_mode",
    "check_repeatable",
    "checked_logits",
    "competing",
    "dtype_name",
    "dtype_named",
    "explanation_name",
    "fingerprint",
    "first_fingerprint",
    "forward",
    "gradients_apart",
    "has_hooks",
    "input_gradient",
    "input_hash",
    "is_identified",
    "is_out_of_memory",
    "logits_in",
    "neutral",
    "neutral_methods",
    "other_behaviour",
    "other_map",
    "other_model",
    "private_copy",
    "scores",
    "selected_logits",
    "unchanged",
    "unwrapped",
    "users_defaults",
    "values_hash",
]
