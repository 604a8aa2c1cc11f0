"""From samples to certificates: the loop over samples, the bounds, the theorems, the files."""

from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.certificate.statements import Overlap
from robattr_fast.certificates.engine.certify import certify
from robattr_fast.certificates.engine.plan import StopWhen
from robattr_fast.certificates.engine.run import Progress
from robattr_fast.certificates.engine.suggest import Suggestion, suggest
from robattr_fast.certificates.settings import Settings
from robattr_fast.metrics.overlap import overlap

__all__ = ["Certificate", "Overlap", "Progress", "Settings", "StopWhen", "Suggestion", "certify", "overlap", "suggest"]
