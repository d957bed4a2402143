"""What must be right before a rotation touches anything; each refusal is a sentence.

A refusal is no failure: nothing was done, and the alert that keeps firing calls people.
"""

import asyncio
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.utils import CryptographyDeprecationWarning

from exporter.checks.certificates import DAY, Certificate, Root, is_due
from exporter.checks.certificates.layouts import PKI_DIRECTORIES
from exporter.kubernetes.access import AccessError
from exporter.kubernetes.client import ApiError
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.backup_place import (
    directory_problem,
    link_problem,
    size_of,
    space_problem,
)
from remediator.fixes.certificates.cluster import (
    default_configuration,
    fetch_configuration,
    refuse_unready_peers,
    refuse_wrong_clock,
)
from remediator.fixes.certificates.etcd import Etcd, EtcdError, find_access, quorum_problem
from remediator.fixes.certificates.kubeadm import (
    Kubeadm,
    KubeadmError,
    certificate_life,
    certificates_directory,
    cluster_version,
    find_configuration,
    read_configuration,
)
from remediator.fixes.certificates.layout import (
    ETCD_MANIFEST,
    ETCD_STASH,
    Layout,
    Pair,
    PairError,
    check_pair,
)
from remediator.fixes.certificates.lease import RotationLease
from remediator.fixes.certificates.members import MembersError, stacked_data, stored_members
from remediator.fixes.certificates.plan import (
    RefusedError,
    RotationPlan,
    components_here,
    saved_configuration,
)
from remediator.fixes.certificates.recovery import is_stopped
from remediator.fixes.certificates.settings import Settings
from remediator.fixes.certificates.uptake import newest_write

NEW_LIFE = 365.0 * DAY
"""Seconds that kubeadm gives a certificate unless its configuration says otherwise."""
_NEEDED_BY_API = {
    "admin.conf",
    "apiserver",
    "apiserver-etcd-client",
    "etcd-server",
    "etcd-peer",
}
"""Without any of these it's gone, or doesn't know us any more."""
_CLOCK_TOLERANCE = 300.0  # seconds
_BACKDATED = 300.0  # seconds: so much before now a certificate begins that has a life of its own


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
        "KubeadmTooNew",
        "KubeadmFailed",
        "NoConfiguration",
        "BackupImpossible",
        "ApiUnreachable",
        "PeerNotReady",
        "EtcdUnhealthy",
        "AnotherRotating",
        "AnotherFailed",
        "RecoveryByPerson",
    )

    def __init__(
        self,
        settings: Settings,
        *,
        root: Root,
        kubeadm: Kubeadm,
        clock: Callable[[], float],
        node_name: str,
    ) -> None:
        self._settings = settings
        self._root = root
        self._kubeadm = kubeadm
        self._clock = clock
        self._node = node_name
        self._api = ApiServer(root)
        self._lease = RotationLease(self._api, node_name, settings.deadline, clock)

    async def plan(
        self, layout: Layout, due: Sequence[Pair], *, by_person: bool = False
    ) -> RotationPlan:
        """How to rotate. RefusedError where it must not be done."""
        await asyncio.to_thread(self._check_files, layout)
        try:
            version = await self._kubeadm.version()
        except KubeadmError as error:
            raise RefusedError(error.reason, str(error)) from None
        components = components_here(self._root)
        recovery, fetched = False, ""
        if "kube-apiserver" in components:
            etcd = await self._look_at_etcd(layout)
            try:
                await self._lease.check()
            except (ApiError, AccessError) as error:
                await self._refuse_unless_expired(layout, str(error), etcd, by_person=by_person)
                recovery = True
            else:
                fetched = await self._check_cluster(etcd)
        config = self._configuration(layout, fetched=bool(fetched))
        if recovery and "etcd" in components:
            data = stacked_data(self._root)
            self._check_space(await asyncio.to_thread(size_of, self._root, data))
        if recovery and not config:
            fetched = default_configuration(version, self._root, self._node)
            config = saved_configuration(self._settings)
        text = fetched if config == saved_configuration(self._settings) and fetched else ""
        text = text or read_configuration(self._root, config)
        if config:
            self._check_configuration(config, text, layout, version)
        life = certificate_life(text)
        self._refuse_what_would_not_help(layout, life)
        return RotationPlan(
            layout=layout,
            due=tuple(p.name for p in due),
            config=config,
            fetched_config=fetched,
            components=components,
            recovery=recovery,
        )

    async def _check_cluster(self, etcd: str) -> str:
        """The cluster's kubeadm configuration, once it is seen to be fit.

        etcd: what is wrong with it, if anything.
        """
        if etcd:
            raise RefusedError("EtcdUnhealthy", etcd)
        try:
            if self._settings.require_ready_peers:
                await refuse_unready_peers(self._api, self._node)
            await refuse_wrong_clock(self._api, self._node, self._clock)
            return await fetch_configuration(self._api, self._root, self._node)
        except (ApiError, AccessError) as error:  # so it isn't gone, and nothing to recover from
            raise RefusedError(
                "ApiUnreachable", f"{error}; it had answered a moment before: look at it first"
            ) from None

    async def _look_at_etcd(self, layout: Layout) -> str:
        """What is wrong with its members, in a sentence; empty where nothing is, or none is here.
        RefusedError where a snapshot would find no room.

        Asked of our own member, before the API: an API server whose member is frozen answers late
        or never, and a balancer may send us to that one.
        """
        if is_stopped(self._root):
            return (
                "etcd is stopped here by a recovery, which is under way or never ended: then "
                f"mv {ETCD_STASH} {ETCD_MANIFEST}"
            )
        access = find_access(self._root, layout.pki)
        if access is None:
            return ""
        try:
            etcd = Etcd(self._root, access)
            members = await etcd.members()
            problem = quorum_problem(members, await etcd.unhealthy(members))
            status = await etcd.status()
        except EtcdError as error:
            return str(error)
        if self._settings.etcd_snapshot and not problem:
            self._check_space(int(status.get("dbSize") or 0))
        return problem

    async def _refuse_unless_expired(
        self, layout: Layout, why: str, etcd: str, *, by_person: bool
    ) -> None:
        """An API that's gone because certificates expired is what recovery is for; else refuse."""
        now = self._clock()
        expired = [p.name for p in layout.pairs if p.certificate.remaining(now) < 0]
        needed = _NEEDED_BY_API.intersection(expired)
        if etcd and not needed:
            raise RefusedError("EtcdUnhealthy", f"{etcd}; nor does the API answer: {why}")
        if not needed:
            raise RefusedError(
                "ApiUnreachable",
                f"{why}; no certificate that it needs has expired, so that has another cause: mend "
                "it first",
            )
        mode = self._settings.recovery
        if by_person and mode != "never":
            return
        try:
            members = await asyncio.to_thread(stored_members, self._root)
        except MembersError as error:
            known = str(error)
        else:
            if mode == "single" and layout.etcd == "stacked" and len(members) == 1:
                return
            known = f"etcd's members are {', '.join(m.name or 'one not started' for m in members)}"
        raise RefusedError(
            "RecoveryByPerson",
            f"{', '.join(expired)} expired and the API is gone; {known}. On every control plane "
            "node, at the same time: upkeep-remediator run rotate-certificates --force",
        )

    def _check_space(self, extra: int) -> None:
        problem = space_problem(self._root, self._settings.backup_directory, extra)
        if problem:
            raise RefusedError("BackupImpossible", problem)

    def _check_files(self, layout: Layout) -> None:
        now = self._clock()
        for ca in dict.fromkeys(pair.ca for pair in layout.pairs):
            self._check_ca(ca, now)
        if newest_write(self._root, layout) > now + _CLOCK_TOLERANCE:
            raise RefusedError(
                "ClockWrong",
                "certificates were written later than now: the clock was set back; set it right",
            )
        for pair in layout.pairs:
            self._check_pair(pair)
        directory = self._settings.backup_directory
        problem = directory_problem(self._root, directory)
        if problem := problem or link_problem(self._root, layout.files):
            raise RefusedError("BackupImpossible", problem)
        self._check_space(0)

    def _refuse_what_would_not_help(self, layout: Layout, life: float | None) -> None:
        """RefusedError where new certificates would be due at once, or end before the old ones,
        or after their CA. life: as the configuration says it, seconds."""
        now = self._clock()
        ends = now + (life or NEW_LIFE)
        days = (life or NEW_LIFE) / DAY
        for pair in layout.pairs:
            # A kubeadm that can be told a life begins it now; older ones begin it with the CA's.
            begins = pair.certificate.not_before if life is None else now - _BACKDATED
            new = msgspec.structs.replace(pair.certificate, not_before=begins, not_after=ends)
            if self._is_due(new, now):
                raise RefusedError(
                    "WouldNotHelp",
                    f"a renewed certificate lives {days:.4g} days and would be due at once; lower "
                    "act_below_days, or raise kubeadm's certificateValidityPeriod",
                )
            if ends <= pair.certificate.not_after:
                raise RefusedError(
                    "WouldNotHelp",
                    f"a renewed certificate lives {days:.4g} days, and {pair.name} ends later than "
                    "that already: kubeadm renews all at once; renew single ones by hand",
                )
        for ca in dict.fromkeys(pair.ca for pair in layout.pairs):
            self._check_ca_end(ca, self._read_ca(ca), now, ends)

    def _is_due(self, certificate: Certificate, now: float) -> bool:
        return is_due(
            certificate,
            now,
            days=self._settings.act_below_days,
            fraction=self._settings.act_below_fraction,
        )

    def _check_pair(self, pair: Pair) -> None:
        try:
            check_pair(self._root, pair)
        except PairError as error:
            raise RefusedError(
                "PairMismatch", f"{error}; look at the last backup before renewing"
            ) from None

    def _read_ca(self, ca: str) -> x509.Certificate:
        try:
            with warnings.catch_warnings():  # kubeadm's CAs had the serial number 0 for years
                warnings.simplefilter("ignore", CryptographyDeprecationWarning)
                data = Path(self._root.resolve(ca + ".crt")).read_bytes()
                return x509.load_pem_x509_certificate(data)
        except (OSError, ValueError) as error:
            raise RefusedError(
                "CAMissing", f"{ca}.crt can't be read ({type(error).__name__}); restore it first"
            ) from None

    def _check_ca(self, ca: str, now: float) -> None:
        certificate = self._read_ca(ca)
        begins = certificate.not_valid_before_utc.timestamp()
        if now + _CLOCK_TOLERANCE < begins:
            raise RefusedError(
                "ClockWrong", f"the clock is before the beginning of {ca}.crt; set it right first"
            )
        self._check_ca_key(ca, certificate)

    def _check_ca_end(self, ca: str, certificate: x509.Certificate, now: float, new: float) -> None:
        ends = certificate.not_valid_after_utc.timestamp()
        if ends < new and not self._settings.accept_ca_ending_first:
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
        except TypeError:
            raise RefusedError(
                "CAKeyMissing", f"{ca}.key is behind a password, which nobody gives kubeadm"
            ) from None
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise RefusedError(
                "CAKeyMissing", f"{ca}.key can't be read ({type(error).__name__})"
            ) from None
        if public != certificate.public_key():
            raise RefusedError("CAKeyMissing", f"{ca}.key is not the key of {ca}.crt")

    def _configuration(self, layout: Layout, *, fetched: bool) -> str:
        saved = saved_configuration(self._settings)
        if fetched and not self._settings.kubeadm_config:
            return saved  # written from the cluster's own before it is used
        chosen = self._settings.kubeadm_config
        if chosen and not self._root.exists(chosen):
            raise RefusedError("NoConfiguration", f"kubeadm_config {chosen} is not there")
        path = find_configuration(self._root, chosen, saved)
        if not path:
            if layout.pki == "/etc/kubernetes/pki" and layout.etcd != "host":
                return ""  # kubeadm's defaults are this very layout
            raise RefusedError(
                "NoConfiguration",
                f"certificates are in {layout.pki} and the cluster's kubeadm configuration is not "
                "known; name it in kubeadm_config",
            )
        return path

    def _check_configuration(
        self, path: str, text: str, layout: Layout, version: tuple[int, int]
    ) -> None:
        """RefusedError where kubeadm would renew other files than these, or not take it at all."""
        named = certificates_directory(text) or PKI_DIRECTORIES[0]
        if self._root.real(named) != self._root.real(layout.pki):
            raise RefusedError(
                "NoConfiguration",
                f"{path} says certificates are in {named}, but they are in {layout.pki}; name the "
                "right configuration in kubeadm_config",
            )
        of_cluster = cluster_version(text)
        if of_cluster and of_cluster < (version[0], version[1] - 1):
            raise RefusedError(
                "KubeadmTooNew",
                f"kubeadm {version[0]}.{version[1]} takes no configuration of a cluster of "
                f"{of_cluster[0]}.{of_cluster[1]}, which {path} is of; install kubeadm "
                f"{of_cluster[0]}.{of_cluster[1]}, or name it in `kubeadm`",
            )
