"""`rotate-certificates`, in the order in which it works.

`preflight` refuses, `backup` makes the way back, `kubeadm` renews, and `rotation` is the order of
the steps and what happens when one fails. `fix` is what the worker sees.
"""

from remediator.fixes.certificates.fix import RotateCertificates
from remediator.fixes.certificates.settings import Settings

__all__ = ["RotateCertificates", "Settings"]
