"""From samples to certificates: the loop over samples, the bounds, the theorems, the files."""

from robattr_fast.certify.certificate import Certificate, Overlap
from robattr_fast.certify.engine import Progress, StopWhen, certify
from robattr_fast.certify.overlap import overlap
from robattr_fast.certify.settings import Settings
from robattr_fast.certify.suggest import Suggestion, suggest

__all__ = ["Certificate", "Overlap", "Progress", "Settings", "StopWhen", "Suggestion", "certify", "overlap", "suggest"]
