"""The steps of one rotation, in order, each recorded before it begins; and the way back.

Until the renewal nothing is changed. From then on a failure puts the old certificates back and in
use again. `resume` does the same for a rotation whose owner died: the step log says what was begun,
the disk what came of it, and every step may be taken twice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
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
    check_names,
    check_renewed,
    is_whole,
    roll_back,
)
from remediator.fixes.certificates.restart import RestartError
from remediator.fixes.certificates.settings import Settings
from remediator.fixes.certificates.uptake import Uptake
from remediator.fixes.certificates.way_back import WayBack
from remediator.model import FixError, Outcome, Phase, Step, Steps
from remediator.shield import to_its_end

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
        self._way_back = WayBack(settings, root, self._uptake)
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
        failed = ""
        try:
            if locked:
                await self._take_lease(steps)
            backup = await self._back_up(plan, steps)
            failed = "it was interrupted"
            outcome = await self._change(plan, backup, steps)
            failed = ""
        except RefusedError as refused:
            locked = refused.reason == "ApiUnreachable"  # the answer was lost: it may be ours
            return Outcome(phase=Phase.SKIPPED, reason=refused.reason, message=str(refused))
        except FixError as error:
            failed = failed and str(error)
            raise
        finally:
            await to_its_end(self._leave(steps.unfailing(), locked=locked, failed=failed))
        return outcome

    async def _leave(self, steps: Steps, *, locked: bool, failed: str) -> None:
        """Leave neither etcd stopped nor the Lease taken. FixError."""
        try:
            await recovery.start(self._root, self._uptake, steps, healthy=False)
        except RestartError as error:
            raise FixError("RestartFailed", str(error)) from None
        finally:
            if locked:
                await self._lease.give_back(steps, failed=failed)

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
            finally:
                await to_its_end(asyncio.to_thread(writer.discard))
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
            index = Index(
                node=self._node,
                created=datetime.fromtimestamp(self._clock(), UTC),
                serials=plan.layout.serials,
                files=files,
                etcd=etcd,
            )
            backup = await asyncio.to_thread(writer.finish, index)
            step.result = f"{len(files)} files, read back and compared"
        return backup

    async def _change(self, plan: RotationPlan, backup: Backup, steps: Steps) -> Outcome:
        """Renew and bring into use; on any failure bring the old ones back into use."""
        begun = self._clock()

        async def forward() -> Outcome:
            await self._renew(plan, backup, begun, steps)
            if not plan.recovery:
                await self._uptake.await_absent(plan.components, steps)
            return await self._use(plan, steps)

        return await self._or_back(forward(), plan, backup, begun, steps=steps)

    async def _or_back(
        self,
        work: Awaitable[Outcome],
        plan: RotationPlan,
        backup: Backup,
        begun: float,
        *,
        steps: Steps,
    ) -> Outcome:
        """What the work comes to; where it fails or is cut short, the old certificates in use."""
        try:
            return await work
        except FixError:  # whole, and waiting for other nodes: there is nothing to undo
            raise
        except Exception as error:  # a journal that's away too: nothing may be left half-way
            await self._way_back.go(plan, backup, begun, steps, why=str(error))
            raise FixError("RolledBack", f"{error}; the old certificates are back") from error
        except asyncio.CancelledError:
            why = "it was stopped, or ran out of time"
            await self._way_back.go(plan, backup, begun, steps, why=why)
            raise

    async def _renew(self, plan: RotationPlan, backup: Backup, begun: float, steps: Steps) -> None:
        data: Mapping[str, Any] = {
            "directory": f"{self._settings.backup_directory}/{backup.directory.name}",
            "config": plan.config,
            "recovery": plan.recovery,
            "begun": begun,
        }
        async with steps.step("renew", "kubeadm certs renew all", **data) as step:
            await self._kubeadm.renew_all(plan.config)
            new = await asyncio.to_thread(check_renewed, self._root, plan.layout, begun)
            await asyncio.to_thread(check_names, self._root, backup, new)
            step.result = f"{len(new.pairs)} certificates renewed, keys match, and names"

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
            await self._uptake.verify(plan.components, steps)
        async with steps.step("prune", "remove old backups") as step:
            step.result = await asyncio.to_thread(self._prune)
        return Outcome(
            phase=Phase.SUCCEEDED,
            reason="Renewed",
            message=f"{len(plan.layout.pairs)} certificates renewed on node {self._node}",
        )

    def _prune(self) -> str:
        """What was removed, or why not, in words: no reason to give a rotation up."""
        try:
            directory = self._settings.backup_directory
            removed = prune(self._root, directory, self._settings.keep_backups, node=self._node)
            return f"{len(removed)} removed"
        except OSError as error:
            return f"{error.filename} could not be looked through: {error.strerror}"

    async def resume(self, layout: Layout | None, steps: Steps) -> Outcome:
        """Finish or undo what a dead owner began; by what is on disk, never blindly."""
        renewal = _renewal(steps)
        failed = "it was interrupted, and ending it failed" if renewal else ""
        try:
            if renewal is None:
                directory = self._settings.backup_directory
                await asyncio.to_thread(discard_begun, self._root, directory)
                return Outcome(
                    phase=Phase.FAILED,
                    reason=INTERRUPTED,
                    message="it was interrupted before any certificate was changed",
                )
            outcome = await self._resume_after_renewal(renewal, layout, steps)
            failed = "" if outcome.phase is Phase.SUCCEEDED else outcome.message
        except FixError as error:
            failed = str(error)
            raise
        finally:
            await self.let_go(steps, failed)
        return outcome

    async def let_go(self, steps: Steps, failed: str) -> None:
        """Leave what a dead owner began, but neither etcd stopped nor the Lease taken. FixError."""
        locked = any(step.name == "lock" for step in steps.earlier)
        await to_its_end(self._leave(steps.unfailing(), locked=locked, failed=failed))

    async def undo(self, steps: Steps, *, why: str) -> None:
        """The way back of what a dead owner began, whatever else has failed. FixError."""
        if (renewal := _renewal(steps)) is not None:
            plan, backup = await to_its_end(self._left(renewal, None))
            await self._way_back.go(plan, backup, renewal.data["begun"], steps, why=why)

    async def _left(self, renewal: Step, layout: Layout | None) -> tuple[RotationPlan, Backup]:
        """What a dead owner had in mind, and what there is to go back to. FixError."""
        data = renewal.data
        directory = Path(self._root.resolve(data["directory"]))
        try:
            backup = await asyncio.to_thread(load, directory)
        except BackupError as error:
            raise FixError("RollbackFailed", str(error)) from None
        plan = RotationPlan(
            layout=layout or Layout(pki="", pairs=(), etcd=""),
            due=(),
            config=data["config"],
            components=components_here(self._root),
            recovery=data["recovery"],
        )
        return plan, backup

    async def _resume_after_renewal(
        self, renewal: Step, layout: Layout | None, steps: Steps
    ) -> Outcome:
        plan, backup = await self._left(renewal, layout)
        undone = any(step.name == ROLL_BACK for step in steps.earlier)
        whole = layout is not None and is_whole(self._root, backup, layout, self._clock())
        why = "the rotation was interrupted"
        if whole and not undone:
            try:
                return await self._use(plan, steps)
            except FixError:
                raise
            except Exception as error:  # noqa: BLE001 - a journal that's away too
                why = f"{why}, and {error}"
        elif plan.recovery:  # forward is the only way, from files that are whole
            before = await roll_back(self._root, backup, steps)
            plan = msgspec.structs.replace(plan, layout=before)
            return await self._change(plan, backup, steps)
        await self._way_back.go(plan, backup, renewal.data["begun"], steps, why=why)
        return Outcome(
            phase=Phase.FAILED,
            reason=INTERRUPTED,
            message=f"{why}; the old certificates are back",
        )


def _renewal(steps: Steps) -> Step | None:
    """The step with which a dead owner began to change something."""
    return next((s for s in reversed(steps.earlier) if s.name == "renew"), None)
