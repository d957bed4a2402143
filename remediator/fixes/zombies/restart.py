"""Restarts a container whose first process doesn't reap: the last rung, and only with leave.

Only where the kubelet will start it again, not twice for one workload within the cooldown, and not
for ever: whoever floods again and again needs people. The restart is on record before the signal.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from signal import SIGKILL, SIGTERM, Signals

from exporter.checks.cgroups import ContainerRef
from exporter.checks.containers import ContainerNames, LogFolders
from exporter.checks.procfs import ProcessGoneError, Procfs
from exporter.checks.zombies import Identity, membership
from exporter.logs import get_logger
from remediator.fixes.zombies.facts import RestartHistory
from remediator.fixes.zombies.off_loop import OffLoop
from remediator.fixes.zombies.parents import Processes, stat_of
from remediator.fixes.zombies.plan import ADVICE, Finding, Settings, why_no_restart
from remediator.fixes.zombies.signals import Pidfds, Sent
from remediator.model import Outcome, Phase, Steps

log = get_logger("remediator.fixes.zombies")

_POLL = 0.5  # seconds
_TERM = 1 << (SIGTERM - 1)


class Restart:
    """One restart of the finding's container."""

    def __init__(
        self,
        settings: Settings,
        finding: Finding,
        steps: Steps,
        *,
        procfs: Procfs,
        folders: LogFolders,
        pidfds: Pidfds,
        history: RestartHistory,
        off_loop: OffLoop,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._finding = finding
        self._steps = steps
        self._procfs = procfs
        self._folders = folders
        self._pidfds = pidfds
        self._history = history
        self._off_loop = off_loop
        self._now = now
        self._sleep = sleep

    async def run(self, left: Sequence[Identity], *, ended: int) -> Outcome:
        """Stop the container, see its zombies gone and its successor running."""
        stay = f"{len(left)} zombies stay"
        first = await self._off_loop(
            lambda: Processes(self._procfs).first_process(self._finding.container)
        )
        if first is None:
            return self._not_allowed("it has no first process that could be stopped", stay, ended)
        if no := why_no_restart(self._finding.facts, self._settings.max_stop_grace):
            return self._not_allowed(no, stay, ended)
        if no := self._worn_out() or self._not_recorded():
            return _failed("NeedsPeople", f"{stay}; the container is not restarted: {no}. {ADVICE}")
        return await self._stop_and_see(first, len(left))

    async def _stop_and_see(self, first: Identity, zombies: int) -> Outcome:
        names = self._finding.names
        log.warning(
            "Upkeep restarts a container whose first process leaves zombies",
            namespace=names.namespace,
            pod=names.pod,
            container=names.container,
            zombies=zombies,
            advice=ADVICE,
        )
        message = f"Stop container {names.container}, so that the kubelet starts it anew."
        container = self._finding.container._asdict()
        async with self._steps.step("stop-container", message, container=container) as step:
            if not await self._stop(first):
                step.result = "The container did not stop."
                return _failed(
                    "ZombiesStayed",
                    f"{zombies} zombies stay; the container did not stop on SIGKILL.",
                )
            step.result = "The container stopped, and its zombies are gone with it."
        message = "Wait for the kubelet to start the container again."
        async with self._steps.step("await-container", message) as step:
            if not await self._started_again():
                step.result = "It was not started again in time."
                return _failed(
                    "NotRestarted",
                    f"The zombies are gone, but container {names.container} was not started again "
                    f"within {self._settings.wait_restart:g} s; see `kubectl describe pod`.",
                )
            step.result = "It runs again."
        message = f"All {zombies} zombies are gone: the container was restarted. {ADVICE}"
        return Outcome(phase=Phase.SUCCEEDED, reason="ContainerRestarted", message=message)

    def _not_allowed(self, why: str, stay: str, ended: int) -> Outcome:
        message = f"{stay}; the container is not restarted: {why}. {ADVICE}"
        if ended:
            return _failed("ZombiesStayed", message)
        return Outcome(phase=Phase.SKIPPED, reason="RestartNotAllowed", message=message)

    def _not_recorded(self) -> str:
        """Put the restart on record; why that failed, upon which it must not happen."""
        now = self._now()
        try:
            self._history.add(self._finding.workload, now, now - self._settings.restarts_window)
        except OSError as error:
            return f"the restart can't be put on record in {self._settings.state_file} ({error})"
        return ""

    def _worn_out(self) -> str:
        """Why this workload isn't restarted again; empty where nothing is against it."""
        workload = self._finding.workload
        try:
            times = self._history.read(workload)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{self._settings.state_file} can't be read ({error}); mend or remove it"
        now = self._now()
        recent = [at for at in times if at > now - self._settings.restarts_window]
        if len(recent) >= self._settings.max_restarts:
            days = self._settings.restarts_window / 86400
            return f"{workload} was restarted {len(recent)} times in {days:g} days and floods again"
        if recent and recent[-1] > now - self._settings.restart_cooldown:
            minutes = (recent[-1] + self._settings.restart_cooldown - now) / 60
            return f"{workload} was restarted already and may be again in {minutes:.0f} min"
        return ""

    async def _stop(self, first: Identity) -> bool:
        """SIGTERM where it is heard, a wait, SIGKILL; True once the first process is gone."""
        grace = self._finding.facts.grace
        if await self._off_loop(lambda: self._hears_term(first)):
            sent = await self._off_loop(lambda: self._send(first, SIGTERM))
            wait = self._settings.stop_grace if grace is None else grace
            if sent is Sent.SENT and await self._gone(first, wait):
                return True
        await self._off_loop(lambda: self._send(first, SIGKILL))
        return await self._gone(first, self._settings.wait_sigkill + 10)

    def _hears_term(self, first: Identity) -> bool:
        """The kernel drops SIGTERM to a namespace's pid 1 that has no handler for it."""
        with suppress(ProcessGoneError):
            return bool(self._procfs.status(first.pid).caught & _TERM)
        return False

    def _send(self, first: Identity, number: Signals) -> Sent:
        def still() -> bool:
            pids = self._procfs.status(first.pid).namespace_pids
            member = membership(self._procfs, first.pid).container
            return len(pids) > 1 and pids[-1] == 1 and member == self._finding.container

        return self._pidfds.send(first, number, still)

    async def _gone(self, first: Identity, seconds: float) -> bool:
        for _ in range(max(1, round(seconds / _POLL))):
            await self._sleep(_POLL)
            if await self._off_loop(lambda: stat_of(self._procfs, first)) is None:
                return True
        return False

    async def _started_again(self) -> bool:
        finding = self._finding

        def runs() -> bool:
            return successor_runs(self._procfs, self._folders, finding.names, finding.container)

        for _ in range(max(1, round(self._settings.wait_restart / _POLL))):
            if await self._off_loop(runs):
                return True
            await self._sleep(_POLL)
        return False


def successor_runs(
    procfs: Procfs, folders: LogFolders, names: ContainerNames, old: ContainerRef
) -> bool:
    """Whether a newer container of that name has a running first process. `ProcfsError`."""
    ids = folders.ids(names) - {old.container_id}
    processes = Processes(procfs) if ids else None
    return processes is not None and any(
        processes.first_process(ContainerRef(old.pod_uid, new)) is not None for new in ids
    )


def _failed(reason: str, message: str) -> Outcome:
    return Outcome(phase=Phase.FAILED, reason=reason, message=message)
