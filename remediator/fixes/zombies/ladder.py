"""Goes up the ladder against one container's zombies: SIGCHLD, SIGTERM, SIGKILL, restart.

Before every signal the parent and its zombies are looked at anew; what has changed is left alone.
Every rung ends as soon as the zombies are gone.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from signal import SIGCHLD, SIGKILL, SIGTERM, Signals

from exporter.checks.containers import LogFolders
from exporter.checks.procfs import Procfs, ProcfsError
from exporter.checks.zombies import Identity
from exporter.logs import get_logger
from remediator.fixes.zombies.facts import RestartHistory
from remediator.fixes.zombies.off_loop import OffLoop
from remediator.fixes.zombies.parents import (
    Group,
    Reaps,
    Role,
    groups_of,
    stat_of,
    unchanged,
)
from remediator.fixes.zombies.plan import (
    ADVICE,
    Finding,
    Level,
    Settings,
    level_for,
    why_not_killed,
)
from remediator.fixes.zombies.restart import Restart
from remediator.fixes.zombies.signals import Pidfds, Sent
from remediator.model import FixError, Outcome, Phase, Steps

log = get_logger("remediator.fixes.zombies")

_POLL = 0.25  # seconds between looks at what is left
_SETTLE = 2.0  # seconds for an adopter to reap what it was just given
_ROUNDS = 4  # of ending parents: zombies may go from one to the next
_NEVER = (Role.RUNTIME, Role.HOST)


class Ladder:
    """One climb, for one finding. Blocking reads run `off_loop`."""

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
        pids_left: Callable[[], float],
        off_loop: OffLoop,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._finding = finding
        self._steps = steps
        self._procfs = procfs
        self._pidfds = pidfds
        self._pids_left = pids_left
        self._off_loop = off_loop
        self._sleep = sleep
        self._left = [zombie.identity for zombie in finding.zombies]
        self._adopters: dict[Identity, Reaps] = {}
        self._ended = 0
        self._restart = Restart(
            settings,
            finding,
            steps,
            procfs=procfs,
            folders=folders,
            pidfds=pidfds,
            history=history,
            off_loop=off_loop,
            now=now,
            sleep=sleep,
        )

    async def climb(self) -> Outcome:
        """How it ended. `FixError` where /proc can't be read any more."""
        if self._finding.opted_out:
            return _skipped("OptedOut", f"Nothing was done: {self._finding.opted_out}.")
        try:
            return await self._climb()
        except ProcfsError as error:
            raise FixError(
                "CannotLook", f"stopped half-way, /proc can't be read: {error}"
            ) from error

    async def _climb(self) -> Outcome:
        if not await self._ask():
            return self._succeeded("Reaped", "their parents reaped them after SIGCHLD")
        if self._finding.level.reaches(Level.KILL_PARENTS):
            await self._end_parents()
            if self._ended:
                log.warning(
                    "Upkeep ended processes that left zombies",
                    ended=self._ended,
                    advice=ADVICE,
                    **self._finding.names._asdict(),
                )
            if not self._left:
                return self._succeeded(
                    "ParentsEnded", f"{self._ended} parents that did not reap were ended"
                )
        pids_left = await self._off_loop(self._pids_left)
        level = level_for(self._settings, len(self._left), pids_left)
        if self._finding.level.reaches(Level.RESTART_CONTAINER) and level.reaches(
            Level.RESTART_CONTAINER
        ):
            return await self._restart.run(self._left, ended=self._ended)
        return await self._leave()

    async def _leave(self) -> Outcome:
        """Zombies stay, and no level allows more: say which and why."""
        groups = await self._groups()
        left = f"{len(self._left)} of {len(self._finding.zombies)} zombies stay"
        why = " ".join(why_not_killed(groups))
        if not self._finding.level.reaches(Level.KILL_PARENTS):
            message = f"{left} after SIGCHLD; so few are not worth ending a process for."
            return _skipped("BelowActLimit", message)
        if self._ended:  # something was done: never "Skipped", which counts for nothing
            message = f"{left}, though {self._ended} parents were ended. {why}"
            return Outcome(phase=Phase.FAILED, reason="ZombiesStayed", message=message.strip())
        if self._finding.level.reaches(Level.RESTART_CONTAINER):
            message = f"{left}; so few are not worth restarting the container for. {why}"
            return _skipped("BelowActLimit", message.strip())
        return _skipped("WouldNotHelp", f"{left}. {why}".strip())

    async def _ask(self) -> list[Identity]:
        groups = [g for g in await self._groups() if g.parent.role not in _NEVER]
        message = f"Send SIGCHLD to {len(groups)} parents and wait for them to reap."
        async with self._steps.step("sigchld", message, parents=_told(groups)) as step:
            tally = await self._signal(groups, SIGCHLD)
            await self._wait(self._settings.wait_sigchld)
            step.result = f"{_sent(tally)}; {len(self._left)} zombies left."
        return self._left

    async def _end_parents(self) -> None:
        """End parents where that frees their zombies, round by round while it does."""
        for _ in range(_ROUNDS):
            groups = [g for g in await self._groups() if g.worth_killing]
            if not groups:
                return
            batch = _one_for_each_doubt(groups)
            message = f"Send SIGTERM to {len(batch)} parents and wait for them to end."
            async with self._steps.step("sigterm", message, parents=_told(batch)) as step:
                tally = await self._signal(batch, SIGTERM)
                ended = await self._wait_for_end(batch, self._settings.wait_sigterm)
                step.result = f"{_sent(tally)}; {len(ended)} ended; {len(self._left)} zombies left."
            alive = [group for group in batch if group not in ended]
            if alive:
                message = f"Send SIGKILL to {len(alive)} parents that did not end."
                async with self._steps.step("sigkill", message, parents=_told(alive)) as step:
                    tally = await self._signal(alive, SIGKILL)
                    ended += await self._wait_for_end(alive, self._settings.wait_sigkill)
                    step.result = f"{_sent(tally)}; {len(self._left)} zombies left."
            self._ended += len(ended)
            if not self._left:
                return
            self._learn(ended)

    def _learn(self, ended: Sequence[Group]) -> None:
        """Whether the adopters of the ended parents' zombies took care of them."""
        left = set(self._left)
        for group in ended:
            if group.parent.adopter is not None:
                answer = Reaps.NO if left & set(group.zombies) else Reaps.YES
                if self._adopters.get(group.parent.adopter) is not Reaps.NO:
                    self._adopters[group.parent.adopter] = answer

    async def _groups(self) -> tuple[Group, ...]:
        return await self._off_loop(
            lambda: groups_of(self._procfs, self._finding.container, self._left, self._adopters)
        )

    async def _signal(self, groups: Sequence[Group], number: Signals) -> Counter[Sent]:
        def send(group: Group) -> Sent:
            return self._pidfds.send(
                group.parent.identity,
                number,
                lambda: unchanged(self._procfs, group, self._finding.container),
            )

        tally = await self._off_loop(lambda: Counter(send(group) for group in groups))
        log.info(
            "Upkeep signalled parents of zombies",
            signal=number.name,
            sent=tally[Sent.SENT],
            gone=tally[Sent.GONE],
            changed=tally[Sent.CHANGED],
            **self._finding.names._asdict(),
        )
        return tally

    def _look(self) -> None:
        stats = ((identity, stat_of(self._procfs, identity)) for identity in self._left)
        self._left = [identity for identity, stat in stats if stat is not None]

    async def _wait(self, seconds: float) -> None:
        """Until no zombie is left, or the time is up."""
        for _ in range(max(1, round(seconds / _POLL))):
            await self._off_loop(self._look)
            if not self._left:
                return
            await self._sleep(_POLL)
        await self._off_loop(self._look)

    async def _wait_for_end(self, groups: Sequence[Group], seconds: float) -> list[Group]:
        """The parents that ended, once all did and their zombies had time to go too."""
        settle = _SETTLE
        ended: list[Group] = []
        for _ in range(max(1, round(seconds / _POLL))):
            await self._sleep(_POLL)
            await self._off_loop(self._look)
            ended = await self._off_loop(lambda: [g for g in groups if self._has_ended(g)])
            if len(ended) == len(groups):
                settle -= _POLL
                mine = {identity for group in groups for identity in group.zombies}
                if settle <= 0 or not mine & set(self._left):
                    break
        return ended

    def _has_ended(self, group: Group) -> bool:
        stat = stat_of(self._procfs, group.parent.identity)
        return stat is None or stat.zombie

    def _succeeded(self, reason: str, how: str) -> Outcome:
        message = f"All {len(self._finding.zombies)} zombies are gone: {how}."
        return Outcome(phase=Phase.SUCCEEDED, reason=reason, message=message)


def _one_for_each_doubt(groups: Sequence[Group]) -> list[Group]:
    """All whose adopter is known to reap; of the others one for each adopter, to see whether."""
    batch = [group for group in groups if group.reaps is Reaps.YES]
    doubtful = {g.parent.adopter: g for g in groups if g.reaps is Reaps.UNKNOWN}
    return batch + list(doubtful.values())


def _told(groups: Sequence[Group]) -> list[str]:
    """Some of the parents, for the record."""
    return [
        f"{g.parent.identity} {g.parent.comm.decode('utf-8', 'replace')!a}: "
        f"{len(g.zombies)} zombies"
        for g in groups[:20]
    ]


def _sent(tally: Counter[Sent]) -> str:
    return ", ".join(f"{tally[sent]} {sent.value}" for sent in Sent if tally[sent]) or "none sent"


def _skipped(reason: str, message: str) -> Outcome:
    return Outcome(phase=Phase.SKIPPED, reason=reason, message=message)
