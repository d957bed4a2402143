"""`rotate-certificates`: renew what kubeadm manages on this node, without breaking the cluster.

What is refused is refused before anything is touched. From then on the backup is the way back: what
fails is put back as it was, and a rotation whose owner died is finished or undone by the next one,
which can see from the serials on disk how far it came.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from exporter.checks.certificates import DAY, Certificate, Root, is_due
from exporter.logs import get_logger
from remediator.fixes.certificates import commands
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.cluster import opted_out
from remediator.fixes.certificates.kept import Listed, list_backups
from remediator.fixes.certificates.kubeadm import Kubeadm
from remediator.fixes.certificates.kubelet import kubelet_problem
from remediator.fixes.certificates.layout import Layout, Pair, read_layout
from remediator.fixes.certificates.lease import RotationLease
from remediator.fixes.certificates.plan import RefusedError, RotationPlan
from remediator.fixes.certificates.preflight import Preflight
from remediator.fixes.certificates.renewal import await_kubeadm, renewing
from remediator.fixes.certificates.restore import PUT_BACK, Restore, Restoring
from remediator.fixes.certificates.rotation import INTERRUPTED, Rotation
from remediator.fixes.certificates.settings import Settings
from remediator.fixes.certificates.uptake import Uptake
from remediator.model import (
    CheckError,
    Condition,
    Fix,
    FixError,
    Outcome,
    Phase,
    Steps,
    Target,
)

log = get_logger("remediator.rotate-certificates")

CLEARED = "ConditionCleared"
TAKEN_UP = "take up"
_MOST_DEATHS = 2  # one more is left to people, before the engine gives it up as it stands


class RotateCertificates:
    """Implements `remediator.model.Fix` for the node it runs on."""

    name = "rotate-certificates"
    target_labels = ("node",)
    reasons: Mapping[Phase, tuple[str, ...]] = {
        Phase.SUCCEEDED: ("Renewed", *Restore.reasons[Phase.SUCCEEDED]),
        Phase.FAILED: (
            "BackupFailed",
            "RenewalFailed",
            "RolledBack",
            "RollbackFailed",
            "RestartFailed",
            "AwaitingPeers",
            INTERRUPTED,
            *Restore.reasons[Phase.FAILED],
        ),
        Phase.SKIPPED: (
            CLEARED,
            *Preflight.reasons,
            "KubeadmBusy",
            "KubeletUnhealthy",
            *Restore.reasons[Phase.SKIPPED],
        ),
    }

    def __init__(
        self,
        settings: Settings,
        *,
        node_name: str,
        rootfs: Path = Path("/"),
        procfs: Path = Path("/proc"),
        run: commands.Run = commands.run,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """rootfs, procfs: where the host's are seen; clock: Unix seconds."""
        self._settings = settings
        self._node = node_name
        self._root = Root(rootfs)
        self._clock = clock
        self.deadline = settings.deadline
        self._procfs = procfs
        self._api = ApiServer(self._root)
        kubeadm = Kubeadm(self._root, run, path=settings.kubeadm, timeout=settings.kubeadm_timeout)
        self._preflight = Preflight(
            settings, root=self._root, kubeadm=kubeadm, clock=clock, node_name=node_name
        )
        self._rotation = Rotation(
            settings,
            root=self._root,
            procfs=procfs,
            kubeadm=kubeadm,
            clock=clock,
            node_name=node_name,
        )
        self._restore = Restore(
            settings,
            root=self._root,
            uptake=Uptake(
                settings, root=self._root, procfs=procfs, clock=clock, node_name=node_name
            ),
            api=self._api,
            lease=RotationLease(self._api, node_name, settings.deadline, clock),
            clock=clock,
            node_name=node_name,
        )

    async def check(self, target: Target) -> Condition:
        """Whether a certificate is due, and whether renewing it now is safe and would help."""
        return await self._check(target, forced=False)

    async def force(self, target: Target) -> Condition:
        """The same for a person who wants them renewed whether or not they are due."""
        return await self._check(target, forced=True)

    async def _check(self, target: Target, *, forced: bool) -> Condition:
        layout = await asyncio.to_thread(self._read_layout, target)
        now = self._clock()
        due = layout.pairs if forced else tuple(p for p in layout.pairs if self._is_due(p, now))
        if not due:
            return self._not_due(layout, now)
        try:
            await asyncio.to_thread(self._refuse_two_renewals)
            plan = await self._preflight.plan(layout, due, by_person=forced)
            if plan.components and self._settings.restart != "none":
                await self._refuse_unrestartable()
        except RefusedError as refused:
            return Condition(broken=False, reason=refused.reason, message=str(refused))
        forbidden = ""
        if plan.has_cluster and not plan.recovery:
            forbidden = await opted_out(self._api, self._node)
        first = min(due, key=lambda pair: pair.certificate.not_after)
        message = (
            f"{len(due)} of {len(layout.pairs)} certificates are due; {first.name} "
            f"{_ends(first.certificate, now)}"
        )
        return Condition(
            broken=True,
            reason="CertificatesDue",
            message=message,
            identities=frozenset(f"{p.name}:{p.certificate.serial}" for p in due),
            plan=self._rotation.describe(plan),
            opted_out=forbidden,
            detail=plan,
        )

    def _refuse_two_renewals(self) -> None:
        if (found := renewing(self._procfs, self._root)) is not None:
            raise RefusedError(
                "KubeadmBusy", f"somebody renews already: kubeadm with pid {found[0]} still runs"
            )

    async def _refuse_unrestartable(self) -> None:
        if problem := await kubelet_problem(self._root):
            raise RefusedError("KubeletUnhealthy", f"{problem}: mend it first")

    def _read_layout(self, target: Target) -> Layout:
        if target.node != self._node:
            raise CheckError(f"this is node {self._node}, not {target.node}")
        return read_layout(self._root)

    def _is_due(self, pair: Pair, now: float) -> bool:
        return is_due(
            pair.certificate,
            now,
            days=self._settings.act_below_days,
            fraction=self._settings.act_below_fraction,
        )

    def _not_due(self, layout: Layout, now: float) -> Condition:
        if not layout.pairs:
            message = f"node {self._node} has no certificates that kubeadm manages"
            return Condition(broken=False, reason=CLEARED, message=message)
        first = min(layout.pairs, key=lambda pair: pair.certificate.not_after)
        message = f"no certificate is due; the first, {first.name}, {_ends(first.certificate, now)}"
        return Condition(broken=False, reason=CLEARED, message=message)

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        """Renew exactly what the condition was found on."""
        plan = condition.detail
        if not isinstance(plan, RotationPlan):
            raise CheckError(f"the check of {target} gave no plan")
        return await self._rotation.run(plan, steps)

    async def verify(self, target: Target, condition: Condition) -> Condition:
        """Broken while a serial acted on is still on disk, or a certificate is still due."""
        layout = await asyncio.to_thread(self._read_layout, target)
        on_disk = {f"{name}:{serial}" for name, serial in layout.serials.items()}
        if left := sorted(condition.identities & on_disk):
            return Condition(
                broken=True,
                reason="NotRenewed",
                message=f"not renewed: {', '.join(left)}",
                identities=frozenset(left),
            )
        now = self._clock()
        due = [pair for pair in layout.pairs if self._is_due(pair, now)]
        if not due:
            return self._not_due(layout, now)
        return Condition(
            broken=True,
            reason="StillDue",
            message=f"still due: {', '.join(pair.name for pair in due)}",
            identities=frozenset(f"{p.name}:{p.certificate.serial}" for p in due),
        )

    async def resume(self, target: Target, steps: Steps) -> Outcome:
        """Finish or undo what a dead owner began; not for ever, for it may be what killed it."""
        restores = any(step.name == PUT_BACK for step in steps.earlier)
        died = 1 + sum(step.name == TAKEN_UP for step in steps.earlier)
        if died > _MOST_DEATHS:
            message = (
                f"its process died {died} times, at last in step {steps.earlier[-1].name!r}, so it "
                f"is not taken up once more: look why it dies{_way_out(steps)}"
            )
            await self._rotation.let_go(steps, message)
            raise FixError("RestoreFailed" if restores else INTERRUPTED, message)
        try:
            async with steps.step(TAKEN_UP, f"finish or undo what was begun; {died} died in it"):
                await await_kubeadm(self._procfs, self._settings.kubeadm_timeout, self._root)
            if restores:
                return await self._restore.resume(steps)
            layout = await asyncio.to_thread(self._read_layout_or_none, target)
            return await self._rotation.resume(layout, steps)
        except FixError:
            raise
        except asyncio.CancelledError:
            if not restores:
                await self._rotation.undo(steps, why="it was stopped, or ran out of time")
            raise
        except Exception as error:
            if restores:
                raise
            await self._rotation.undo(steps, why=str(error))
            raise FixError(INTERRUPTED, f"{error}; no new certificate is left") from error

    def restoring(self, backup: str, *, forced: bool) -> Fix:
        """`upkeep-remediator restore BACKUP`: the fix that puts this backup back and in use."""
        return Restoring(self._restore, self, backup, forced=forced)

    def backups(self) -> list[Listed]:
        """What there is to restore, newest first."""
        return list_backups(self._root, self._settings.backup_directory)

    def _read_layout_or_none(self, target: Target) -> Layout | None:
        try:
            return self._read_layout(target)
        except CheckError as error:
            # A death in the middle of kubeadm's writing leaves such files: the backup mends them.
            log.warning("the certificates can't be read as they are", why=str(error))
            return None


def _way_out(steps: Steps) -> str:
    """How a person gets back to what there was before a dead owner began; empty where it's there.

    That is the backup that it made first, whatever it was about to do.
    """
    begun = next((s for s in steps.earlier if s.name in ("renew", PUT_BACK)), None)
    if begun is None:
        return ""
    kept = begun.data.get("kept") or Path(begun.data["directory"]).name
    return f". What there was before: upkeep-remediator restore {kept}"


def _ends(certificate: Certificate, now: float) -> str:
    remaining = certificate.remaining(now)
    size = abs(remaining)
    text = f"{size / DAY:.0f} days" if size >= 2 * DAY else f"{size / 3600:.1f} hours"
    return f"has {text} left" if remaining >= 0 else f"expired {text} ago"
