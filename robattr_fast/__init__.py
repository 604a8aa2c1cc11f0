"""Saliency maps that come with a proof: fused operators and certificates for robust attribution."""

from robattr_fast import backends, reference
from robattr_fast.errors import BackendError, CertificateFileError, MergeError, ModelError, NonFiniteError
from robattr_fast.ops import noisy_samples

__all__ = [
    "BackendError",
    "CertificateFileError",
    "MergeError",
    "ModelError",
    "NonFiniteError",
    "backends",
    "noisy_samples",
    "reference",
]
