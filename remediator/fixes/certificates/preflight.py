"""What must be right before a rotation touches anything; each refusal is a sentence.

A refusal is no failure: nothing was done, and the alert that keeps firing calls people.
"""

import asyncio
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.utils import CryptographyDeprecationWarning

from exporter.checks.certificates import DAY, Certificate, Root, is_due
from remediator.fixes.certificates.backup import directory_problem, space_problem
from remediator.fixes.certificates.kubeadm import (
    Kubeadm,
    KubeadmError,
    certificates_directory,
    find_configuration,
)
from remediator.fixes.certificates.layout import Layout, Pair, PairError, check_pair
from remediator.fixes.certificates.rotation import RotationPlan, saved_configuration
from remediator.fixes.certificates.settings import Settings

NEW_LIFE_DAYS = 365.0
"""What kubeadm gives a certificate unless its configuration says otherwise."""
_CLOCK_TOLERANCE = 300.0  # seconds


class RefusedError(Exception):
    """Renewing now would not be safe, or would not help."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Preflight:
    """Everything that is looked at before a rotation."""

    reasons = (
        "ClockWrong",
        "CAMissing",
        "CAKeyMissing",
        "CAEndsFirst",
        "PairMismatch",
        "WouldNotHelp",
        "KubeadmMissing",
        "KubeadmTooOld",
        "KubeadmFailed",
        "NoConfiguration",
        "BackupImpossible",
    )

    def __init__(
        self, settings: Settings, root: Root, kubeadm: Kubeadm, clock: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._root = root
        self._kubeadm = kubeadm
        self._clock = clock

    async def plan(self, layout: Layout, due: Sequence[Pair]) -> RotationPlan:
        """How to rotate. RefusedError where it must not be done."""
        await asyncio.to_thread(self._check_files, layout)
        config = self._configuration(layout)
        try:
            await self._kubeadm.version()
        except KubeadmError as error:
            raise RefusedError(error.reason, str(error)) from None
        return RotationPlan(layout=layout, due=tuple(p.name for p in due), config=config)

    def _check_files(self, layout: Layout) -> None:
        now = self._clock()
        for ca in dict.fromkeys(pair.ca for pair in layout.pairs):
            self._check_ca(ca, now)
        for pair in layout.pairs:
            self._check_pair(pair)
        if is_due(
            _renewed(layout.pairs[0], now),
            now,
            days=self._settings.act_below_days,
            fraction=self._settings.act_below_fraction,
        ):
            raise RefusedError(
                "WouldNotHelp",
                f"a renewed certificate lives {NEW_LIFE_DAYS:.0f} days and would be due at once; "
                "lower act_below_days",
            )
        directory = self._settings.backup_directory
        problem = directory_problem(self._root, directory) or space_problem(self._root, directory)
        if problem:
            raise RefusedError("BackupImpossible", problem)

    def _check_pair(self, pair: Pair) -> None:
        try:
            check_pair(self._root, pair)
        except PairError as error:
            raise RefusedError(
                "PairMismatch", f"{error}; look at the last backup before renewing"
            ) from None

    def _check_ca(self, ca: str, now: float) -> None:
        try:
            with warnings.catch_warnings():  # kubeadm's CAs had the serial number 0 for years
                warnings.simplefilter("ignore", CryptographyDeprecationWarning)
                data = Path(self._root.resolve(ca + ".crt")).read_bytes()
                certificate = x509.load_pem_x509_certificate(data)
        except (OSError, ValueError) as error:
            raise RefusedError(
                "CAMissing", f"{ca}.crt can't be read ({type(error).__name__}); restore it first"
            ) from None
        begins = certificate.not_valid_before_utc.timestamp()
        if now + _CLOCK_TOLERANCE < begins:
            raise RefusedError(
                "ClockWrong", f"the clock is before the beginning of {ca}.crt; set it right first"
            )
        self._check_ca_key(ca, certificate)
        ends = certificate.not_valid_after_utc.timestamp()
        if ends < now + NEW_LIFE_DAYS * DAY and not self._settings.accept_ca_ending_first:
            raise RefusedError(
                "CAEndsFirst",
                f"{ca}.crt ends in {(ends - now) / DAY:.0f} days, before a renewed certificate "
                "would: renew the CA by hand, or set accept_ca_ending_first",
            )

    def _check_ca_key(self, ca: str, certificate: x509.Certificate) -> None:
        try:
            data = Path(self._root.resolve(ca + ".key")).read_bytes()
            public = load_pem_private_key(data, password=None).public_key()
        except FileNotFoundError:
            raise RefusedError(
                "CAKeyMissing",
                f"{ca}.key is not on this node, so kubeadm can't renew what {ca}.crt signs; renew "
                "it where the CA is kept, or put the key there",
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise RefusedError(
                "CAKeyMissing", f"{ca}.key can't be read ({type(error).__name__})"
            ) from None
        shape = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if public.public_bytes(*shape) != certificate.public_key().public_bytes(*shape):
            raise RefusedError("CAKeyMissing", f"{ca}.key is not the key of {ca}.crt")

    def _configuration(self, layout: Layout) -> str:
        saved = saved_configuration(self._settings)
        path = find_configuration(self._root, self._settings.kubeadm_config, saved)
        if not path:
            if layout.pki == "/etc/kubernetes/pki" and layout.etcd != "host":
                return ""  # kubeadm's defaults are this very layout
            raise RefusedError(
                "NoConfiguration",
                f"certificates are in {layout.pki} and the cluster's kubeadm configuration is not "
                "known; name it in kubeadm_config",
            )
        named = certificates_directory(self._root, path)
        if named and self._root.real(named) != self._root.real(layout.pki):
            raise RefusedError(
                "NoConfiguration",
                f"{path} says certificates are in {named}, but they are in {layout.pki}; name the "
                "right configuration in kubeadm_config",
            )
        return path


def _renewed(pair: Pair, now: float) -> Certificate:
    return msgspec.structs.replace(pair.certificate, not_after=now + NEW_LIFE_DAYS * DAY)
