"""`upkeep-remediator restore`: a backup's certificates, keys and kubeconfigs back, and in use.

Only a person asks for it. What is there now becomes a backup first, so a restore by mistake has a
way back too. The step `put back` names the backup: whoever comes after a crash finishes it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import msgspec

from exporter.checks.certificates import Root
from exporter.checks.certificates.layouts import PKI_DIRECTORIES, pki_directory
from exporter.kubernetes.access import AccessError
from exporter.kubernetes.client import ApiError
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.backup import (
    ETCD_DIRECTORY,
    Backup,
    BackupError,
    BackupWriter,
    Index,
    load,
    put_back,
)
from remediator.fixes.certificates.backup_place import directory_problem, space_problem
from remediator.fixes.certificates.cluster import opted_out
from remediator.fixes.certificates.etcd import Etcd, EtcdError, find_access, quorum_problem
from remediator.fixes.certificates.host_etcd import UNIT, restorable_files
from remediator.fixes.certificates.kept import BEFORE_RESTORE, is_whole_set
from remediator.fixes.certificates.layout import Layout, PairError, check_pair, read_layout
from remediator.fixes.certificates.lease import RotationLease
from remediator.fixes.certificates.plan import RefusedError, components_here
from remediator.fixes.certificates.renewal import expired_in, roll_back
from remediator.fixes.certificates.restorable import foreign, is_there, usable
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
from remediator.shield import shielded, to_its_end

PUT_BACK = "put back"


class RestorePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a restore is going to do."""

    backup: Backup
    path: str
    """Its directory as the host names it."""
    expired: tuple[str, ...]
    """Paths of what has ended: then nothing is restarted, since nothing would work with it."""
    locked: bool
    """Whether an API server answers, and so whether the Lease and etcd's quorum can be asked."""


class Restore:
    """Puts a backup back on this node."""

    reasons: Mapping[Phase, tuple[str, ...]] = {
        Phase.SUCCEEDED: ("Restored",),
        Phase.FAILED: ("RestoreFailed",),
        Phase.SKIPPED: (
            "NoBackup",
            "BackupOpen",
            "BackupForeign",
            "BackupExpired",
            "BackupUnsound",
            "AlreadyThere",
        ),
    }

    def __init__(
        self,
        settings: Settings,
        *,
        root: Root,
        uptake: Uptake,
        api: ApiServer,
        lease: RotationLease,
        clock: Callable[[], float],
        node_name: str,
    ) -> None:
        self._settings = settings
        self._root = root
        self._uptake = uptake
        self._api = api
        self._lease = lease
        self._clock = clock
        self._node = node_name

    async def check(self, target: Target, name: str, *, forced: bool) -> Condition:
        """Whether the backup may be put back. CheckError.

        name: in backup_directory, or its path on the host. forced: also one whose certificates
        have expired, or are of another CA than the present ones.
        """
        if target.node != self._node:
            raise CheckError(f"this is node {self._node}, not {target.node}")
        try:
            plan = await self._plan(name, forced=forced)
        except RefusedError as refused:
            return Condition(broken=False, reason=refused.reason, message=str(refused))
        index = plan.backup.index
        message = f"backup {name} of {index.created:%Y-%m-%d %H:%M:%S} UTC can be put back"
        return Condition(
            broken=True,
            reason="RestoreAsked",
            message=f"{message}; expired in it: {', '.join(plan.expired)}"
            if plan.expired
            else message,
            plan=self._describe(plan),
            opted_out=await opted_out(self._api, self._node) if plan.locked else "",
            detail=plan,
        )

    def _describe(self, plan: RestorePlan) -> tuple[str, ...]:
        index = plan.backup.index
        sentences = [
            f"keep what is there now as a backup in {self._settings.backup_directory}",
            f"put back {', '.join(index.serials)} with their keys and CAs",
        ]
        if any(path.startswith(f"{ETCD_DIRECTORY}/") for path in index.files):
            sentences.append(f"put back {ETCD_DIRECTORY} where its CA is the same as now")
            if self._settings.restart == "all" and not plan.expired:
                sentences.append(f"have systemd restart {UNIT} if that changed its files")
        components = components_here(self._root)
        if plan.expired:
            sentences.append("restart nothing, because they have expired")
        elif components and self._settings.restart != "none":
            sentences.append(
                f"restart, one after another: {', '.join(components)} ({self._settings.restart})"
            )
        return tuple(sentences)

    async def _plan(self, name: str, *, forced: bool) -> RestorePlan:
        directory = Path(self._root.resolve(self._path(name)))
        backup = await asyncio.to_thread(usable, directory, name)
        index = backup.index
        if index.node != self._node:
            raise RefusedError("BackupForeign", f"{name} is of node {index.node}, not {self._node}")
        if not forced and (why := await asyncio.to_thread(foreign, self._root, backup)):
            raise RefusedError("BackupForeign", f"{name} has another {why}; then --force")
        expired = tuple(await asyncio.to_thread(expired_in, backup, self._clock()))
        if expired and not forced:
            raise RefusedError(
                "BackupExpired",
                f"expired in {name}: {', '.join(expired)}; renew instead, or --force where even "
                "they are better than what is there",
            )
        if not forced and await asyncio.to_thread(is_there, self._root, backup):
            raise RefusedError("AlreadyThere", f"the files of {name} are those on this node")
        where = self._settings.backup_directory
        problem = directory_problem(self._root, where)
        if problem := problem or await asyncio.to_thread(space_problem, self._root, where):
            raise RefusedError("BackupImpossible", f"what is there now can't be kept: {problem}")
        plan = RestorePlan(backup=backup, path=self._path(name), expired=expired, locked=True)
        try:
            await self._lease.check()
        except (ApiError, AccessError):  # perhaps the very reason why it's asked for
            return msgspec.structs.replace(plan, locked=False)
        if not forced and not expired:
            await self._refuse_without_quorum()
        return plan

    async def _refuse_without_quorum(self) -> None:
        """RefusedError where etcd could not be restarted now: better before than half-way."""
        access = find_access(self._root, pki_directory(self._root.exists))
        if access is None or self._settings.restart != "all":
            return
        etcd = Etcd(self._root, access)
        try:
            members = await etcd.members() if await etcd.healthy() else ()
            problem = quorum_problem(members, await etcd.unhealthy(members))
        except EtcdError:  # what is put back may be just what it lacks
            return
        if problem:
            raise RefusedError("EtcdUnhealthy", problem)

    def _path(self, name: str) -> str:
        return name if name.startswith("/") else f"{self._settings.backup_directory}/{name}"

    async def run(self, plan: RestorePlan, steps: Steps) -> Outcome:
        """Do it. FixError where it ended otherwise."""
        return await self._giving_back(self._run(plan, steps), steps, locked=plan.locked)

    async def _run(self, plan: RestorePlan, steps: Steps) -> Outcome:
        if plan.locked:
            async with steps.step("lock", "take the Lease that lets one node rotate at a time"):
                await self._lease.acquire()
        return await self._change(plan, steps)

    async def _giving_back(
        self, work: Awaitable[Outcome], steps: Steps, *, locked: bool
    ) -> Outcome:
        """Do the work, then give the Lease back, marked where it failed. FixError."""
        failed = "a restore was interrupted"
        try:
            outcome = await work
            failed = ""
        except RefusedError as refused:  # the Lease is another node's
            locked = False
            return Outcome(phase=Phase.SKIPPED, reason=refused.reason, message=str(refused))
        except (ApiError, AccessError) as error:  # the answer was lost: the Lease may be ours
            failed = ""
            raise FixError("RestoreFailed", f"{error}; nothing was changed") from None
        except FixError as error:
            failed = str(error)
            raise
        finally:
            if locked:
                await to_its_end(self._lease.give_back(steps.unfailing(), failed=failed))
        return outcome

    async def _change(self, plan: RestorePlan, steps: Steps) -> Outcome:
        try:
            kept = await self._keep_present(steps)
        except (BackupError, OSError) as error:
            raise FixError("RestoreFailed", f"{error}; nothing was changed") from None
        return await self._use(plan, kept, steps)

    async def _keep_present(self, steps: Steps) -> str:
        created = datetime.fromtimestamp(self._clock(), UTC)
        name = created.strftime("%Y%m%dT%H%M%SZ") + BEFORE_RESTORE
        async with steps.step("backup", f"keep what is there now as {name}") as step:
            writer = BackupWriter(self._root, self._settings.backup_directory, name)
            try:
                files = await asyncio.to_thread(writer.add_files, ())
                serials = await asyncio.to_thread(self._serials)
                writer.finish(Index(node=self._node, created=created, serials=serials, files=files))
            finally:
                writer.discard()
            step.result = f"{len(files)} files, read back and compared"
        return name

    def _serials(self) -> dict[str, str]:
        """Of what is there; none where it is no whole set, which nobody should put back."""
        try:
            layout = read_layout(self._root)
            for pair in layout.pairs:
                check_pair(self._root, pair)
        except (CheckError, PairError):
            return {}
        return layout.serials

    async def _use(self, plan: RestorePlan, kept: str, steps: Steps) -> Outcome:
        """Files, restarts, verification: each may be done twice. FixError."""
        name = plan.backup.directory.name
        try:
            counted = await self._has_healthy_etcd(pki_directory(self._root.exists))
            layout = await shielded(self._put_back(plan, kept, steps))
            if plan.expired:
                return Outcome(
                    phase=Phase.SUCCEEDED,
                    reason="Restored",
                    message=f"the files of {name} are back; they have expired, so nothing was "
                    "restarted: upkeep-remediator run rotate-certificates --force",
                )
            components = components_here(self._root)
            counted = counted or await self._has_healthy_etcd(layout.pki)
            quorum = plan.locked and counted
            await self._uptake.restart(components, layout, steps, quorum=quorum)
            if "kube-apiserver" in components and self._settings.restart != "none":
                await self._uptake.verify(components, steps)
        except Exception as error:
            back = f"what was there before is {kept}"
            if is_whole_set(self._root, self._settings.backup_directory, kept):
                back = f"what was there before: upkeep-remediator restore {kept}"
            raise FixError(
                "RestoreFailed", f"{name} was being put back, but {error}; {back}"
            ) from error
        return Outcome(
            phase=Phase.SUCCEEDED,
            reason="Restored",
            message=f"the certificates of {name} are back and in use; what was there before is "
            f"{kept}",
        )

    async def _put_back(self, plan: RestorePlan, kept: str, steps: Steps) -> Layout:
        data = {"directory": plan.path, "kept": kept, "locked": plan.locked}
        layout = await roll_back(self._root, plan.backup, steps, name=PUT_BACK, **data)
        others = self._lost(plan.backup)
        await asyncio.to_thread(put_back, self._root, plan.backup, others)
        if layout.etcd == "host":
            await self._put_back_etcd(plan.backup, steps)
        return layout

    def _lost(self, backup: Backup) -> list[str]:
        """What lay beside the certificates, is not kubeadm's, and is gone. What is there stays: an
        older key for what is encrypted in etcd would make that unreadable."""
        return [
            path
            for path in backup.index.files
            if any(PurePosixPath(path).is_relative_to(pki) for pki in PKI_DIRECTORIES)
            and not self._root.exists(path)
        ]

    async def _has_healthy_etcd(self, pki: str) -> bool:
        """Whether a member here counts for the quorum. One that doesn't takes nothing from it by a
        restart, and may wait for just that."""
        access = find_access(self._root, pki)
        return access is not None and await Etcd(self._root, access).healthy()

    async def _put_back_etcd(self, backup: Backup, steps: Steps) -> None:
        """Kubespray's certificates for etcd, which are not kubeadm's. BackupError."""
        async with steps.step("put back etcd", "put back the files of etcd on the host") as step:
            paths = await asyncio.to_thread(restorable_files, self._root, backup, self._clock())
            changed = await asyncio.to_thread(put_back, self._root, backup, paths)
            step.result = f"{len(changed)} files put back"
            if not paths:
                step.result = "left alone: none there, of another CA than etcd's now, or expired"

    async def verify(self, condition: Condition) -> Condition:
        """Broken while a serial on disk is another than the backup's. CheckError."""
        layout = await asyncio.to_thread(read_layout, self._root)
        wanted = condition.detail.backup.index.serials
        others = sorted(n for n in wanted if layout.serials.get(n) != wanted[n])
        return Condition(
            broken=bool(others),
            reason="NotRestored" if others else "AlreadyThere",
            message=f"not as in the backup: {', '.join(others)}" if others else "as in the backup",
        )

    async def resume(self, steps: Steps) -> Outcome:
        """Finish what a dead owner began to put back; it may be begun from any point. FixError."""
        data = next(s for s in reversed(steps.earlier) if s.name == PUT_BACK).data
        path = data["directory"]
        try:
            backup = await asyncio.to_thread(load, Path(self._root.resolve(path)))
            expired = tuple(await asyncio.to_thread(expired_in, backup, self._clock()))
        except BackupError as error:
            raise FixError("RestoreFailed", f"{error}; it was interrupted half-way") from None
        plan = RestorePlan(backup=backup, path=path, expired=expired, locked=data["locked"])
        work = self._use(plan, data["kept"], steps)
        return await self._giving_back(work, steps, locked=plan.locked)


class Restoring:
    """One restore as a `remediator.model.Fix`, for the same worker, journal and locks."""

    def __init__(self, restore: Restore, fix: Fix, name: str, *, forced: bool) -> None:
        """fix: `rotate-certificates`, as which it runs and is resumed."""
        self.name, self.deadline, self.target_labels = fix.name, fix.deadline, fix.target_labels
        self.reasons = fix.reasons
        self.resume = fix.resume
        self._restore = restore
        self._backup = name
        self._forced = forced

    async def check(self, target: Target) -> Condition:
        """Whether the backup may be put back."""
        return await self._restore.check(target, self._backup, forced=self._forced)

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        """Put it back and in use."""
        if not isinstance(condition.detail, RestorePlan):
            raise CheckError(f"the check of {target} gave no plan")
        return await self._restore.run(condition.detail, steps)

    async def verify(self, target: Target, condition: Condition) -> Condition:
        """Whether what is on disk is what the backup holds."""
        return await self._restore.verify(condition)
