"""The steps of one rotation, in order, each recorded before it begins; and the way back.

Until the renewal nothing is changed. If the renewal does not come out whole, the files are put back
from the backup. `resume` is the same for a rotation whose owner died: it looks at the step log for
what was begun and at the disk for what came of it.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from exporter.checks.certificates import Root
from remediator.fixes.certificates import commands
from remediator.fixes.certificates.backup import (
    Backup,
    BackupError,
    BackupWriter,
    Index,
    load,
    prune,
    put_back,
)
from remediator.fixes.certificates.kubeadm import Kubeadm, KubeadmError
from remediator.fixes.certificates.layout import Layout, PairError, check_pair, read_layout
from remediator.fixes.certificates.settings import Settings
from remediator.model import CheckError, FixError, Outcome, Phase, Steps

INTERRUPTED = "Interrupted"


class RotationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the preflight found, and therefore how to rotate."""

    layout: Layout
    due: tuple[str, ...]
    """Names of the certificates that called for it; all are renewed."""
    config: str
    """For `kubeadm --config`, on the host; empty: kubeadm's defaults."""


def saved_configuration(settings: Settings) -> str:
    """Where the cluster's kubeadm configuration is kept for when the API is down."""
    return f"{settings.backup_directory}/kubeadm-config.yaml"


class Rotation:
    """Does it."""

    def __init__(
        self,
        settings: Settings,
        *,
        root: Root,
        procfs: Path,
        kubeadm: Kubeadm,
        run: commands.Run,
        clock: Callable[[], float],
        node_name: str,
    ) -> None:
        self._settings = settings
        self._root = root
        self._procfs = procfs
        self._kubeadm = kubeadm
        self._run = run
        self._clock = clock
        self._node = node_name

    def describe(self, plan: RotationPlan) -> tuple[str, ...]:
        """What `run` would do, a sentence each."""
        config = f" --config {plan.config}" if plan.config else ""
        directory = self._settings.backup_directory
        return (
            f"back up /etc/kubernetes with its keys to {directory}",
            f"kubeadm certs renew all{config}: {', '.join(p.name for p in plan.layout.pairs)}",
            "compare serials, dates and keys with what was there before",
        )

    async def run(self, plan: RotationPlan, steps: Steps) -> Outcome:
        """Rotate. FixError where it ended with the old certificates in place, or worse."""
        backup = await self._back_up(plan, steps)
        await self._renew(plan, backup, steps)
        return await self._finish(plan.layout, steps)

    async def _back_up(self, plan: RotationPlan, steps: Steps) -> Backup:
        name = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y%m%dT%H%M%SZ")
        directory = f"{self._settings.backup_directory}/{name}"
        async with steps.step(
            "backup", f"back up keys, certificates and configuration to {directory}"
        ) as step:
            try:
                writer = BackupWriter(self._root, self._settings.backup_directory, name)
            except BackupError as error:
                raise FixError("BackupFailed", f"{error}; nothing was changed") from None
            try:
                copies = [p for p in self._settings.kubeconfig_copies if self._root.exists(p)]
                files = await asyncio.to_thread(writer.add_files, copies)
                backup = writer.finish(
                    Index(
                        node=self._node,
                        created=datetime.fromtimestamp(self._clock(), UTC),
                        serials=plan.layout.serials,
                        files=files,
                    )
                )
            except BackupError as error:
                raise FixError("BackupFailed", f"{error}; nothing was changed") from None
            finally:
                writer.discard()
            step.data["directory"] = directory
            step.result = f"{len(files)} files, read back and compared"
        return backup

    async def _renew(self, plan: RotationPlan, backup: Backup, steps: Steps) -> None:
        old = plan.layout.serials
        data: Mapping[str, Any] = {
            "directory": f"{self._settings.backup_directory}/{backup.directory.name}",
            "serials": old,
            "config": plan.config,
        }
        try:
            async with steps.step("renew", "kubeadm certs renew all", **data) as step:
                await self._kubeadm.renew_all(plan.config)
                new = await asyncio.to_thread(self._check_renewed, plan.layout)
                step.result = f"{len(new.pairs)} certificates renewed, keys match"
        except (KubeadmError, RenewalError, CheckError) as error:
            await self._roll_back(backup, plan.layout, steps)
            raise FixError(
                "RolledBack", f"{error}; the old certificates were put back, nothing was restarted"
            ) from error
        except asyncio.CancelledError:
            await asyncio.shield(self._roll_back(backup, plan.layout, steps))
            raise

    def _check_renewed(self, before: Layout) -> Layout:
        """The layout after a renewal that came out whole. RenewalError, CheckError where not."""
        now = read_layout(self._root)
        if missing := sorted(before.serials.keys() - now.serials.keys()):
            raise RenewalError(f"gone after the renewal: {', '.join(missing)}")
        for old in before.pairs:
            new = next(pair for pair in now.pairs if pair.name == old.name)
            if new.certificate.serial == old.certificate.serial:
                raise RenewalError(f"{old.name} was not renewed")
            if new.certificate.not_after <= max(old.certificate.not_after, self._clock()):
                raise RenewalError(f"{old.name} does not live longer than before")
        for pair in now.pairs:
            try:
                check_pair(self._root, pair)
            except PairError as error:
                raise RenewalError(str(error)) from None
        return now

    async def _roll_back(self, backup: Backup, layout: Layout, steps: Steps) -> None:
        paths = {path for pair in layout.pairs for path in (pair.certificate.path, pair.key)}
        async with steps.step("roll back", f"put back the files of {backup.directory.name}") as s:
            try:
                changed = await asyncio.to_thread(put_back, self._root, backup, paths)
            except BackupError as error:
                raise FixError("RollbackFailed", str(error)) from None
            s.result = f"{len(changed)} files put back"

    async def _finish(self, layout: Layout, steps: Steps) -> Outcome:
        async with steps.step("prune", "remove old backups") as step:
            removed = prune(
                self._root, self._settings.backup_directory, self._settings.keep_backups
            )
            step.result = f"{len(removed)} removed"
        return Outcome(
            phase=Phase.SUCCEEDED,
            reason="Renewed",
            message=f"{len(layout.pairs)} certificates renewed on node {self._node}",
        )

    async def resume(self, layout: Layout | None, steps: Steps) -> Outcome:
        """Finish or undo what a dead owner began; by what is on disk, never blindly."""
        begun = next((s for s in reversed(steps.earlier) if s.name == "renew"), None)
        if begun is None:
            return Outcome(
                phase=Phase.FAILED,
                reason=INTERRUPTED,
                message="the rotation was interrupted before anything was changed",
            )
        try:
            backup = await asyncio.to_thread(
                load, Path(self._root.resolve(begun.data["directory"]))
            )
        except BackupError as error:
            raise FixError("RollbackFailed", str(error)) from None
        old: Mapping[str, str] = begun.data["serials"]
        rolled_back = any(s.name == "roll back" for s in steps.earlier)
        if layout is not None and not rolled_back and self._is_whole(layout, old):
            return await self._finish(layout, steps)
        if layout is None or rolled_back or layout.serials != old:
            await self._put_all_back(backup, old, steps)
        return Outcome(
            phase=Phase.FAILED,
            reason=INTERRUPTED,
            message="the rotation was interrupted; the old certificates are in place everywhere",
        )

    def _is_whole(self, layout: Layout, old: Mapping[str, str]) -> bool:
        new = layout.serials
        if new.keys() != old.keys() or any(new[name] == old[name] for name in old):
            return False
        try:
            for pair in layout.pairs:
                check_pair(self._root, pair)
        except PairError:
            return False
        return True

    async def _put_all_back(self, backup: Backup, names: Mapping[str, str], steps: Steps) -> None:
        pki = ("/etc/kubernetes/pki/", "/etc/kubernetes/ssl/")
        paths = [
            path
            for path in backup.index.files
            if path.startswith(pki)
            or (path.count("/") == 3 and path.endswith(".conf") and Path(path).name in names)
        ]
        async with steps.step("roll back", f"put back the files of {backup.directory.name}") as s:
            try:
                changed = await asyncio.to_thread(put_back, self._root, backup, paths)
            except BackupError as error:
                raise FixError("RollbackFailed", str(error)) from None
            s.result = f"{len(changed)} files put back"


class RenewalError(Exception):
    """A renewal that did not come out whole."""
