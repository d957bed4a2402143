"""What certificates there are, when they end, who renews them, what is served and what is stale.

Pure reading. The collector publishes what these modules find; the remediator uses the same before
and after it acts. Files are read by `files`, TLS endpoints by `served`, and `components` says which
running component uses which file.
"""

from exporter.checks.certificates.files import CertificateReader
from exporter.checks.certificates.model import DAY, Certificate, Inventory, ReadError, is_due
from exporter.checks.certificates.root import Root

__all__ = ["DAY", "Certificate", "CertificateReader", "Inventory", "ReadError", "Root", "is_due"]
