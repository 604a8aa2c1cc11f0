"""Saliency maps that come with a proof: fused operators and certificates for robust attribution."""

from robattr_fast.errors import BackendError, CertificateFileError, MergeError, ModelError, NonFiniteError

__all__ = ["BackendError", "CertificateFileError", "MergeError", "ModelError", "NonFiniteError"]
