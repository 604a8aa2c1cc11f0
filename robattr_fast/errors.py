"""Errors of the package. Wrong values raise ValueError and wrong types TypeError; what stands here is neither."""

from typing import Any


class BackendError(RuntimeError):
    """A backend that was demanded (``strict=True``, or a required extension) cannot run the operator."""


class ModelError(RuntimeError):
    """The model cannot be explained as it is: training mode, wrong output, no gradient to its input."""


class NonFiniteError(RuntimeError):
    """A model returned NaN or infinite scores for finite input."""


class MergeError(RuntimeError):
    """Two certificates do not describe disjoint samples of the same smoothed map."""


class CertificateFileError(RuntimeError):
    """A certificate file is damaged, or its contents contradict each other."""


class CertifyInterrupted(KeyboardInterrupt):
    """Ctrl-C during `certify`; ``certificate`` holds everything sampled until then and is valid as it is."""

    def __init__(self, certificate: Any) -> None:
        super().__init__("certify was interrupted; its partial certificate is in .certificate")
        self.certificate = certificate
