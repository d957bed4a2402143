"""Looks at a container's zombies before, and after, the ladder is climbed."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from exporter.checks.cgroups import CgroupError, CgroupTree, ContainerRef
from exporter.checks.containers import ContainerNames, LogFolders
from exporter.checks.procfs import ProcessGoneError, Procfs, ProcfsError
from exporter.checks.zombies import Look, Zombie, ZombieWatch, membership
from exporter.checks.zombies_scan import full_scan
from remediator.fixes.zombies.facts import FactSource, NoFacts, PodFacts, RestartHistory
from remediator.fixes.zombies.ladder import Ladder
from remediator.fixes.zombies.parents import Processes, groups_of
from remediator.fixes.zombies.plan import (
    Finding,
    Level,
    Settings,
    is_flood,
    level_for,
    plan,
)
from remediator.fixes.zombies.restart import successor_runs
from remediator.fixes.zombies.signals import Pidfds
from remediator.model import CheckError, Condition, FixError, Outcome, Phase, Steps, Target

T = TypeVar("T")


class ReapZombies:
    """The fix. Its edges come in from outside; tests give their own clock, facts and signals.

    facts: what the cluster knows of a pod; clock: seconds that never step back; now: Unix time.
    """

    name = "reap-zombies"
    target_labels = ("node", "namespace", "pod", "container")
    reasons: Mapping[Phase, tuple[str, ...]] = {
        Phase.SUCCEEDED: ("Reaped", "ParentsEnded", "ContainerRestarted"),
        Phase.FAILED: ("ZombiesStayed", "NotRestarted", "NeedsPeople", "CannotLook", "Interrupted"),
        Phase.SKIPPED: (
            "ConditionCleared",
            "BelowActLimit",
            "WouldNotHelp",
            "RestartNotAllowed",
            "OptedOut",
        ),
    }

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        procfs: Path = Path("/proc"),
        rootfs: Path = Path("/"),
        cgroupfs: Path = Path("/sys/fs/cgroup"),
        facts: FactSource | None = None,
        pidfds: Pidfds | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.settings = s = settings or Settings()
        self.deadline = (
            s.wait_sigchld
            + 4 * (s.wait_sigterm + s.wait_sigkill)
            + max(s.stop_grace, s.max_stop_grace)
            + s.wait_restart
            + 120
        )
        self._procfs = Procfs(procfs)
        self._cgroupfs = cgroupfs
        self._folders = LogFolders(rootfs)
        self._watch = ZombieWatch(
            self._procfs, self._folders, lambda: full_scan(self._procfs), clock
        )
        self._facts = facts or NoFacts()
        self._pidfds = pidfds or Pidfds(self._procfs)
        self._now = now
        self._sleep = sleep
        # One thread, made now: where no process slot is left none can be made later.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="zombies")
        self._thread.submit(time.monotonic).result()

    async def check(self, target: Target) -> Condition:
        """Look twice, `min_age` apart, at the container. `CheckError` where it can't be known."""
        wanted = ContainerNames(target.namespace, target.pod, target.container)
        if not all(wanted):
            raise CheckError("a container is named by namespace, pod and container, all three")
        zombies, ref = await self._seen(wanted)
        youngest = min((zombie.age for zombie in zombies), default=self.settings.min_age)
        if youngest < self.settings.min_age:
            await self._sleep(self.settings.min_age - youngest + 0.05)
            zombies, ref = await self._seen(wanted)
        stuck = tuple(z for z in zombies if z.age >= self.settings.min_age)
        if ref is None or not stuck:
            return Condition(
                broken=False,
                reason="ConditionCleared",
                message=f"The {_words(wanted)} has no zombie older than "
                f"{self.settings.min_age:g} s.",
            )
        facts = await self._facts.pod(wanted.namespace, wanted.pod, ref.pod_uid)
        finding = await self._off_loop(lambda: self._finding(wanted, ref, stuck, facts))
        return self._condition(wanted, finding)

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        """Go up the ladder until the zombies named in `condition` are gone."""
        finding = condition.detail
        if not isinstance(finding, Finding):
            raise FixError("CannotLook", "the check's own finding is missing; nothing was done")
        ladder = Ladder(
            self.settings,
            finding,
            steps,
            procfs=self._procfs,
            folders=self._folders,
            pidfds=self._pidfds,
            history=RestartHistory(Path(self.settings.state_file)),
            pids_left=lambda: self._pids_left(finding.container.pod_uid),
            off_loop=self._off_loop,
            now=self._now,
            sleep=self._sleep,
        )
        return await ladder.climb()

    async def verify(self, target: Target, condition: Condition) -> Condition:
        """Broken while a zombie acted on is still there, or too many others have been for long."""
        wanted = ContainerNames(target.namespace, target.pod, target.container)
        zombies, _ = await self._seen(wanted)
        same = [z for z in zombies if str(z.identity) in condition.identities]
        stuck = [z for z in zombies if z.age >= self.settings.min_age]
        left = same or (stuck if len(stuck) >= self.settings.act_at else [])
        if left:
            message = f"{len(left)} zombies are still in the {_words(wanted)}."
            identities = frozenset(str(z.identity) for z in left)
            return Condition(
                broken=True, reason="ZombiesStayed", message=message, identities=identities
            )
        message = f"The zombies of the {_words(wanted)} are gone."
        return Condition(broken=False, reason="ConditionCleared", message=message)

    async def resume(self, target: Target, steps: Steps) -> Outcome:
        """Signals can't be taken back, and mustn't be sent twice unseen: look, and say."""
        stopped = next((s for s in steps.earlier if s.name == "stop-container"), None)
        if stopped is not None:
            return await self._resume_restart(target, ContainerRef(**stopped.data["container"]))
        condition = await self.check(target)
        if not condition.broken:
            return Outcome(phase=Phase.SUCCEEDED, reason="Reaped", message=condition.message)
        done = ", ".join(step.name for step in steps.earlier) or "nothing"
        return Outcome(
            phase=Phase.FAILED,
            reason="Interrupted",
            message=f"Upkeep was interrupted (done so far: {done}) and zombies are still there; "
            "the next alert begins anew.",
        )

    async def _resume_restart(self, target: Target, old: ContainerRef) -> Outcome:
        """The container was told to stop: whether it did, and was started again."""
        names = ContainerNames(target.namespace, target.pod, target.container)
        for _ in range(max(1, round(self.settings.wait_restart))):
            if await self._off_loop(
                lambda: successor_runs(self._procfs, self._folders, names, old)
            ):
                message = f"The {_words(names)} was restarted, and runs."
                return Outcome(phase=Phase.SUCCEEDED, reason="ContainerRestarted", message=message)
            await self._sleep(1.0)
        if await self._off_loop(lambda: Processes(self._procfs).first_process(old)):
            message = (
                f"Upkeep was interrupted before the {_words(names)} stopped; it still runs, "
                "and the next alert begins anew."
            )
            return Outcome(phase=Phase.FAILED, reason="Interrupted", message=message)
        message = (
            f"Upkeep was interrupted while it restarted the {_words(names)}, and no new one runs "
            f"after {self.settings.wait_restart:g} s; see `kubectl describe pod`."
        )
        return Outcome(phase=Phase.FAILED, reason="NotRestarted", message=message)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _seen(self, wanted: ContainerNames) -> tuple[tuple[Zombie, ...], ContainerRef | None]:
        """The zombies of the container of that name, of whatever age."""

        def look() -> Look:
            if self._procfs.own_pid() != os.getpid():
                raise CheckError(
                    f"{self._procfs.root} belongs to another pid namespace, so a pid in it names "
                    "another process here; share the host's pid namespace (hostPID)"
                )
            if not self._pidfds.supported():
                raise CheckError(
                    "this kernel has no process descriptors (pidfd_open), without which "
                    "a signal can hit another process; use Linux 5.3 or later"
                )
            return self._watch.look()

        try:
            seen = await self._off_loop(look)
        except (ProcfsError, ProcessGoneError) as error:
            raise CheckError(f"zombies can't be seen: {error}") from error
        if seen.unreadable:
            raise CheckError(
                f"{seen.unreadable} processes in {self._procfs.root} can't be read; run as root"
            )
        by_ref: dict[ContainerRef, list[Zombie]] = {}
        for zombie in seen.zombies:
            if zombie.container is not None and seen.names[zombie.container] == wanted:
                by_ref.setdefault(zombie.container, []).append(zombie)
        if not by_ref:
            return (), None
        ref = max(by_ref, key=lambda ref: len(by_ref[ref]))  # a successor may overlap for a moment
        return tuple(by_ref[ref]), ref

    def _finding(
        self,
        wanted: ContainerNames,
        ref: ContainerRef,
        stuck: tuple[Zombie, ...],
        facts: PodFacts,
    ) -> Finding:
        pids_left = self._pids_left(ref.pod_uid)
        own = membership(self._procfs, os.getpid()).container
        listed = {wanted.namespace, f"{wanted.namespace}/{wanted.pod}"} & {*self.settings.opt_out}
        opted_out = facts.opted_out
        if own == ref:
            opted_out = "it is the container that Upkeep runs in"
        elif listed:
            opted_out = f"{min(listed)} stands in opt_out of this node's configuration"
        return Finding(
            container=ref,
            names=wanted,
            zombies=stuck,
            groups=groups_of(self._procfs, ref, [z.identity for z in stuck]),
            flood=is_flood(self.settings, len(stuck), pids_left),
            level=level_for(self.settings, len(stuck), pids_left),
            pids_left=pids_left,
            facts=facts,
            opted_out=opted_out,
        )

    def _condition(self, wanted: ContainerNames, finding: Finding) -> Condition:
        count = len(finding.zombies)
        have = f"The {_words(wanted)} has {count} zombies older than {self.settings.min_age:g} s"
        identities = frozenset(str(z.identity) for z in finding.zombies)
        if finding.level is Level.NONE:
            return Condition(
                broken=False,
                reason="BelowActLimit",
                message=f"{have}; fewer than {self.settings.act_at} are left alone.",
                identities=identities,
            )
        oldest = max(z.age for z in finding.zombies)
        return Condition(
            broken=True,
            reason="ZombieFlood" if finding.flood else "ZombiesStuck",
            message=f"{have} under {len(finding.groups)} parents, the oldest seen for "
            f"{oldest:.0f} s; {finding.pids_left:.0f} % of process slots are left.",
            identities=identities,
            plan=plan(finding, self.settings.max_stop_grace),
            opted_out=finding.opted_out,
            workload=finding.facts.workload,
            detail=finding,
        )

    def _pids_left(self, pod_uid: str) -> float:
        """Percent of process slots left, of the node or of the pod, whichever has fewer."""
        limit = self._procfs.task_limit()
        shares = [1 - self._procfs.load().tasks / limit]
        try:
            tree = CgroupTree(self._cgroupfs)
            tree.refresh()
        except CgroupError:
            pass  # the node's own share is known all the same
        else:
            cgroup = tree.pods().get(pod_uid)
            pids = tree.pids(cgroup) if cgroup else None
            if pids is not None and pids[1] > 0:
                shares.append(1 - pids[0] / pids[1])
        return 100 * max(0.0, min(shares))


def _words(names: ContainerNames) -> str:
    return f"container {names.container} of pod {names.namespace}/{names.pod}"
