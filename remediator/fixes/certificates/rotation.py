"""The steps of one rotation, in order, each recorded before it begins; and the way back.

Until the renewal nothing is changed. From then on a failure puts the old certificates back and in
use again. `resume` does the same for a rotation whose owner died: the step log says what was begun,
the disk what came of it, and every step may be taken twice.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from exporter.checks.certificates import Root
from exporter.kubernetes.access import AccessError
from exporter.kubernetes.client import ApiError
from remediator.fixes.certificates import recovery
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.backup import (
    Backup,
    BackupError,
    BackupWriter,
    Index,
    load,
    replace,
)
from remediator.fixes.certificates.copies import renew_copy
from remediator.fixes.certificates.etcd import Etcd, EtcdError, find_access
from remediator.fixes.certificates.kept import discard_begun, prune
from remediator.fixes.certificates.kubeadm import Kubeadm
from remediator.fixes.certificates.layout import Layout
from remediator.fixes.certificates.lease import RotationLease
from remediator.fixes.certificates.plan import (
    RefusedError,
    RotationPlan,
    components_here,
    saved_configuration,
)
from remediator.fixes.certificates.renewal import (
    ROLL_BACK,
    check_renewed,
    is_whole,
    roll_back,
)
from remediator.fixes.certificates.restart import RestartError
from remediator.fixes.certificates.settings import Settings
from remediator.fixes.certificates.uptake import NotServedError, Uptake
from remediator.model import FixError, Outcome, Phase, Step, Steps

INTERRUPTED = "Interrupted"


class Rotation:
    """Does it, on this node."""

    def __init__(
        self,
        settings: Settings,
        *,
        root: Root,
        procfs: Path,
        kubeadm: Kubeadm,
        clock: Callable[[], float],
        node_name: str,
    ) -> None:
        self._settings = settings
        self._root = root
        self._kubeadm = kubeadm
        self._clock = clock
        self._node = node_name
        self._uptake = Uptake(settings, root=root, procfs=procfs, clock=clock, node_name=node_name)
        self._lease = RotationLease(ApiServer(root), node_name, settings.deadline, clock)

    def describe(self, plan: RotationPlan) -> tuple[str, ...]:
        """What `run` would do, a sentence each."""
        directory = self._settings.backup_directory
        config = f" --config {plan.config}" if plan.config else ""
        sentences = [f"back up /etc/kubernetes with its keys to {directory}"]
        if plan.recovery:
            sentences.append("stop etcd and copy its data, since nobody can reach it")
        elif plan.has_etcd and self._settings.etcd_snapshot:
            sentences.append("take a snapshot of etcd and check it")
        sentences.append(
            f"kubeadm certs renew all{config}: {', '.join(p.name for p in plan.layout.pairs)}"
        )
        sentences.append("compare serials, dates and keys with what was there before")
        if plan.components and self._settings.restart != "none":
            sentences.append(
                f"restart, one after another: {', '.join(plan.components)} "
                f"({self._settings.restart})"
            )
        return tuple(sentences)

    async def run(self, plan: RotationPlan, steps: Steps) -> Outcome:
        """Rotate. FixError where it ended with the old certificates in place, or worse."""
        locked = plan.has_cluster and not plan.recovery
        if locked:
            try:
                await self._take_lease(steps)
            except RefusedError as refused:
                return Outcome(phase=Phase.SKIPPED, reason=refused.reason, message=str(refused))
        failed = ""
        try:
            backup = await self._back_up(plan, steps)
            failed = "it was interrupted"
            outcome = await self._change(plan, backup, steps)
            failed = ""
        except FixError as error:
            failed = failed and str(error)
            raise
        finally:
            if locked:
                await asyncio.shield(self._lease.release(failed=failed))
        return outcome

    async def _take_lease(self, steps: Steps) -> None:
        async with steps.step("lock", "take the Lease that lets one node rotate at a time"):
            try:
                await self._lease.acquire()
            except (ApiError, AccessError) as error:
                raise RefusedError("ApiUnreachable", str(error)) from None

    async def _back_up(self, plan: RotationPlan, steps: Steps) -> Backup:
        name = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y%m%dT%H%M%SZ")
        directory = f"{self._settings.backup_directory}/{name}"
        try:
            writer = BackupWriter(self._root, self._settings.backup_directory, name)
            try:
                etcd: Mapping[str, Any] = {}
                if plan.recovery and "etcd" in plan.components:
                    copy = writer.partial / "etcd-data"
                    await recovery.copy_data(self._root, self._uptake, copy, steps)
                    etcd = {"data": "etcd-data"}
                elif self._settings.etcd_snapshot and plan.components:
                    etcd = await self._snapshot(plan, writer, steps)
                return await self._back_up_files(plan, writer, directory, etcd, steps=steps)
            except BaseException:
                await asyncio.shield(recovery.start(self._root, self._uptake, steps, healthy=False))
                raise
            finally:
                writer.discard()
        except (BackupError, EtcdError, RestartError, OSError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise FixError("BackupFailed", f"{why}; no certificate was changed") from None

    async def _snapshot(
        self, plan: RotationPlan, writer: BackupWriter, steps: Steps
    ) -> Mapping[str, Any]:
        access = find_access(self._root, plan.layout.pki)
        if access is None:
            return {}
        async with steps.step("snapshot", "take a snapshot of etcd and check it") as step:
            etcd = Etcd(self._root, access)
            members = await etcd.members()
            status = await etcd.status()
            snapshot = await etcd.snapshot(writer.partial / "etcd-snapshot.db")
            step.result = f"{snapshot.size >> 10} KiB by {snapshot.by}, hash right"
        return {
            "snapshot": {"size": snapshot.size, "sha256": snapshot.sha256, "by": snapshot.by},
            "members": [{"name": m.name, "client_urls": m.client_urls} for m in members],
            "unhealthy": await etcd.unhealthy(members),
            "status": status,
        }

    async def _back_up_files(
        self,
        plan: RotationPlan,
        writer: BackupWriter,
        directory: str,
        etcd: Mapping[str, Any],
        *,
        steps: Steps,
    ) -> Backup:
        message = f"back up keys, certificates and configuration to {directory}"
        async with steps.step("backup", message) as step:
            if plan.fetched_config:
                target = Path(self._root.resolve(saved_configuration(self._settings)))
                owner = (target.parent.stat().st_uid, target.parent.stat().st_gid)
                replace(target, plan.fetched_config.encode(), mode=0o600, owner=owner)
            copies = [p for p in self._settings.kubeconfig_copies if self._root.exists(p)]
            files = await asyncio.to_thread(writer.add_files, copies, plan.layout.files)
            backup = writer.finish(
                Index(
                    node=self._node,
                    created=datetime.fromtimestamp(self._clock(), UTC),
                    serials=plan.layout.serials,
                    files=files,
                    etcd=etcd,
                )
            )
            step.result = f"{len(files)} files, read back and compared"
        return backup

    async def _change(self, plan: RotationPlan, backup: Backup, steps: Steps) -> Outcome:
        """Renew and bring into use; on any failure bring the old ones back into use."""
        begun = self._clock()
        try:
            await self._renew(plan, backup, begun, steps)
            return await self._use(plan, steps)
        except FixError:  # whole, and waiting for other nodes: there is nothing to undo
            raise
        except Exception as error:  # a journal that's away too: nothing may be left half-way
            await self._undo(plan, backup, begun, steps, why=str(error))
            raise FixError("RolledBack", f"{error}; the old certificates are back") from error
        except asyncio.CancelledError:
            await asyncio.shield(self._undo(plan, backup, begun, steps, why="out of time"))
            raise

    async def _renew(self, plan: RotationPlan, backup: Backup, begun: float, steps: Steps) -> None:
        data: Mapping[str, Any] = {
            "directory": f"{self._settings.backup_directory}/{backup.directory.name}",
            "serials": plan.layout.serials,
            "config": plan.config,
            "recovery": plan.recovery,
            "begun": begun,
        }
        async with steps.step("renew", "kubeadm certs renew all", **data) as step:
            await self._kubeadm.renew_all(plan.config)
            new = await asyncio.to_thread(check_renewed, self._root, plan.layout, begun)
            step.result = f"{len(new.pairs)} certificates renewed, keys match"

    async def _use(self, plan: RotationPlan, steps: Steps) -> Outcome:
        """Copies, restarts, verification: each may be done twice. RestartError, NotServedError."""
        async with steps.step("copies", "renew copies of admin.conf of the same identity") as step:
            step.result = "; ".join(
                renew_copy(self._root, path) for path in self._settings.kubeconfig_copies
            )
        await recovery.start(self._root, self._uptake, steps, healthy=not plan.recovery)
        if plan.recovery and "etcd" in plan.components and self._settings.restart != "none":
            await recovery.await_quorum(
                self._root, self._uptake, plan.components, plan.layout, steps
            )
        if plan.components:
            await self._uptake.restart(
                plan.components, plan.layout, steps, quorum=not plan.recovery
            )
        if plan.has_cluster and self._settings.restart != "none":
            await self._uptake.verify(plan.components, plan.layout, steps)
        async with steps.step("prune", "remove old backups") as step:
            directory = self._settings.backup_directory
            removed = prune(self._root, directory, self._settings.keep_backups, node=self._node)
            step.result = f"{len(removed)} removed"
        return Outcome(
            phase=Phase.SUCCEEDED,
            reason="Renewed",
            message=f"{len(plan.layout.pairs)} certificates renewed on node {self._node}",
        )

    async def _undo(
        self, plan: RotationPlan, backup: Backup, begun: float, steps: Steps, *, why: str
    ) -> None:
        """The old certificates back in place and in use. FixError where that fails too."""
        steps = steps.unfailing()
        if plan.recovery:  # the old ones have expired: nothing works with them
            await recovery.start(self._root, self._uptake, steps, healthy=False)
            raise FixError(
                "RenewalFailed",
                f"{why}; the old certificates have expired and were not put back: they are in "
                f"{backup.directory.name}",
            )
        layout = await roll_back(self._root, backup, steps)
        try:
            await self._uptake.restart(plan.components, layout, steps, since=begun)
            if plan.has_cluster and self._settings.restart != "none":
                # An API server that read the new ones by itself serves them for a minute more.
                await self._uptake.verify(plan.components, layout, steps)
        except (RestartError, NotServedError, OSError) as error:
            raise FixError(
                "RestartFailed", f"{why}; the old certificates were put back, but {error}"
            ) from error

    async def resume(self, layout: Layout | None, steps: Steps) -> Outcome:
        """Finish or undo what a dead owner began; by what is on disk, never blindly."""
        renewal = next((s for s in reversed(steps.earlier) if s.name == "renew"), None)
        if renewal is None:
            await self._resume_before_renewal(steps)
            return Outcome(
                phase=Phase.FAILED,
                reason=INTERRUPTED,
                message="it was interrupted before any certificate was changed",
            )
        failed = "it was interrupted, and ending it failed"
        try:
            outcome = await self._resume_after_renewal(renewal, layout, steps)
            failed = "" if outcome.phase is Phase.SUCCEEDED else outcome.message
        except FixError as error:
            failed = str(error)
            raise
        finally:
            if any(step.name == "lock" for step in steps.earlier):
                await asyncio.shield(self._lease.release(failed=failed))
        return outcome

    async def _resume_before_renewal(self, steps: Steps) -> None:
        try:
            await recovery.start(self._root, self._uptake, steps, healthy=False)
        except RestartError as error:
            raise FixError("RestartFailed", str(error)) from None
        discard_begun(self._root, self._settings.backup_directory)
        if any(step.name == "lock" for step in steps.earlier):
            await self._lease.release()

    async def _resume_after_renewal(
        self, renewal: Step, layout: Layout | None, steps: Steps
    ) -> Outcome:
        data = renewal.data
        directory = Path(self._root.resolve(data["directory"]))
        try:
            backup = await asyncio.to_thread(load, directory)
        except BackupError as error:
            raise FixError("RollbackFailed", str(error)) from None
        undone = any(step.name == ROLL_BACK for step in steps.earlier)
        whole = layout is not None and is_whole(self._root, layout, data["serials"], self._clock())
        plan = RotationPlan(
            layout=layout or Layout(pki="", pairs=(), etcd=""),
            due=(),
            config=data["config"],
            components=components_here(self._root),
            recovery=data["recovery"],
        )
        why = "the rotation was interrupted"
        if whole and not undone:
            try:
                return await self._use(plan, steps)
            except (RestartError, NotServedError, OSError) as error:
                why = f"{why}, and {error}"
        elif plan.recovery:  # forward is the only way, from files that are whole
            old = await roll_back(self._root, backup, steps)
            plan = msgspec.structs.replace(plan, layout=old)
            return await self._change(plan, backup, steps)
        await self._undo(plan, backup, data["begun"], steps, why=why)
        return Outcome(
            phase=Phase.FAILED,
            reason=INTERRUPTED,
            message=f"{why}; the old certificates are back",
        )
