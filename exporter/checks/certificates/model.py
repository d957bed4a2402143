"""What a certificate is to Upkeep: its dates, its identity, and who can renew it.

These values are neutral: the collector makes metrics of them and the remediator compares them, so
that the alert and the fix can't disagree about which certificate is meant or when it ends.
"""

import msgspec

DAY = 86400.0


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """One X.509 certificate found in a file."""

    path: str
    """Where it was found, as the host names the file."""
    name: str
    """What kubeadm calls it, else the file's name without its ending."""
    serial: str
    """Upper-case hexadecimal, as `openssl x509 -serial` prints it."""
    subject: str
    """RFC 4514, as is the issuer; shortened where absurdly long."""
    issuer: str
    usage: str
    """`ca`, `client`, `server`, `client,server`, or empty where it is for something else."""
    managed_by: str
    """Who renews it: `kubeadm`, `kubelet`, `kubespray`, `k3s`; empty: nobody but people."""
    not_before: float
    """Unix seconds, as is `not_after`."""
    not_after: float
    fingerprint: str
    """SHA-256 of the DER form, hexadecimal: the identity proper."""

    @property
    def lifetime(self) -> float:
        """Seconds from its first moment to its last."""
        return self.not_after - self.not_before

    def remaining(self, now: float) -> float:
        """Seconds until it ends; negative once it has."""
        return self.not_after - now


class ReadError(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """A file (or an endpoint) that should have given a certificate and did not."""

    path: str
    reason: str
    """A code: `permission_denied`, `truncated`, … (docs/certificates.md has them all)."""


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one reading found."""

    certificates: tuple[Certificate, ...]
    errors: tuple[ReadError, ...]


def is_due(
    certificate: Certificate, now: float, *, days: float = 14.0, fraction: float = 1.0 / 3.0
) -> bool:
    """Whether its rest of life is below `days` and below `fraction` of its whole life.

    A certificate made for a month is thus not due after two weeks, and one made for a year is due
    two weeks before its end.
    """
    remaining = certificate.remaining(now)
    return remaining < days * DAY and remaining < certificate.lifetime * fraction
