"""Decides how far to go against a container's zombies: a function of what was measured.

No label and no name has a say here. The settings stand here too, since they are its terms.
"""

from collections import Counter
from enum import Enum
from typing import Annotated, NamedTuple

import msgspec

from exporter.checks.cgroups import ContainerRef
from exporter.checks.containers import ContainerNames
from exporter.checks.zombies import Zombie
from remediator.config import Seconds
from remediator.fixes.zombies.facts import PodFacts
from remediator.fixes.zombies.parents import Group, Reaps, Role

ADVICE = (
    "To avoid this, run an init such as tini as the container's first process "
    "(or shareProcessNamespace), and bound the pod's processes with podPidsLimit."
)


MAX_MIN_AGE = 120.0  # seconds


class Level(Enum):
    """How far the fix may go; each includes those before it."""

    NONE = "none"
    SIGCHLD = "sigchld"
    KILL_PARENTS = "kill-parents"
    RESTART_CONTAINER = "restart-container"

    def reaches(self, other: "Level") -> bool:
        order = list(Level)
        return order.index(self) >= order.index(other)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of `reap-zombies`."""

    min_age: Seconds = Seconds(30.0)
    """Seconds for which a process must have been seen as a zombie before it counts as stuck."""
    act_at: int = 5
    """Stuck zombies in one container from which on anything is done."""
    flood_at: int = 50
    """Stuck zombies in one container that make a flood."""
    pids_left_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 20.0
    """Below this share of process slots left, of the pod or of the node, `act_at` is a flood."""
    below_flood: Level = Level.SIGCHLD
    """How far to go below a flood: none, sigchld, kill-parents or restart-container.
    `kill-parents` for both levels is the ladder of the operators' guide."""
    at_flood: Level = Level.RESTART_CONTAINER
    """How far to go in a flood."""
    wait_sigchld: Seconds = Seconds(15.0)
    """Seconds for the parents to reap after SIGCHLD."""
    wait_sigterm: Seconds = Seconds(15.0)
    """Seconds for the parents to end after SIGTERM."""
    wait_sigkill: Seconds = Seconds(5.0)
    """Seconds for what is left after SIGKILL."""
    stop_grace: Seconds = Seconds(30.0)
    """Seconds for a container to stop after SIGTERM, unless its pod says another time."""
    max_stop_grace: Seconds = Seconds(300.0)
    """A container whose pod asks for more seconds than this is not restarted."""
    wait_restart: Seconds = Seconds(180.0)
    """Seconds for the kubelet to start the container again."""
    restart_cooldown: Seconds = Seconds(6 * 3600.0)
    """Seconds before a container of the same workload may be restarted again."""
    max_restarts: Annotated[int, msgspec.Meta(ge=0)] = 3
    """Restarts of one workload within `restarts_window`; after that people are called."""
    restarts_window: Seconds = Seconds(7 * 86400.0)
    """Seconds for which a restart is remembered."""
    opt_out: tuple[str, ...] = ("kube-system",)
    """NAMESPACE or NAMESPACE/POD whose containers are left alone, known without the API server."""
    state_file: str = "/var/lib/upkeep/container-restarts.jsonl"
    """Where restarts of containers are remembered."""

    def __post_init__(self) -> None:
        if not 1 <= self.act_at <= self.flood_at:
            raise ValueError("act_at must be at least 1 and no more than flood_at")
        times = (self.min_age, self.wait_sigchld, self.wait_sigterm, self.wait_sigkill)
        more = (self.stop_grace, self.max_stop_grace, self.wait_restart)
        spans = (self.restart_cooldown, self.restarts_window)
        if min(times + more + spans) < 0:
            raise ValueError("a time can't be negative")
        if self.min_age > MAX_MIN_AGE:
            raise ValueError(f"min_age can't be above {MAX_MIN_AGE:g} s: a check waits that long")


class Finding(NamedTuple):
    """What a check found in the target's container, and how far it may go."""

    container: ContainerRef
    names: ContainerNames
    zombies: tuple[Zombie, ...]
    groups: tuple[Group, ...]
    flood: bool
    level: Level
    pids_left: float
    """Percent."""
    facts: PodFacts
    opted_out: str
    """Why the container is to be left alone whatever happens; empty if nothing is against it."""

    @property
    def workload(self) -> str:
        """What restarts are counted for: without an API, the pod."""
        return self.facts.workload or f"Pod/{self.names.namespace}/{self.names.pod}"


def is_flood(settings: Settings, count: int, pids_left: float) -> bool:
    """Whether so many stuck zombies are a flood; pids_left: percent, of pod or node."""
    scarce = pids_left < settings.pids_left_percent
    return count >= settings.flood_at or (count >= settings.act_at and scarce)


def level_for(settings: Settings, count: int, pids_left: float) -> Level:
    """How far to go against `count` stuck zombies."""
    if count < settings.act_at:
        return Level.NONE
    flood = is_flood(settings, count, pids_left)
    return settings.at_flood if flood else settings.below_flood


def plan(finding: Finding, max_grace: float) -> tuple[str, ...]:
    """What would be done, a sentence each. max_grace: see `why_no_restart`."""
    if finding.level is Level.NONE:
        return ()
    parents = len(finding.groups)
    sentences = [f"Send SIGCHLD to {parents} parents, so that they reap."]
    if finding.level.reaches(Level.KILL_PARENTS):
        killable = sum(group.worth_killing for group in finding.groups)
        if killable:
            sentences.append(f"Send SIGTERM, then SIGKILL, to {killable} of them, if they don't.")
        sentences += why_not_killed(finding.groups)
    if finding.level.reaches(Level.RESTART_CONTAINER):
        no = why_no_restart(finding.facts, max_grace)
        sentences.append(
            f"The container is not restarted: {no}."
            if no
            else f"Restart the container {finding.names.container}, if zombies stay."
        )
    return tuple(sentences)


def why_not_killed(groups: tuple[Group, ...]) -> list[str]:
    """A sentence for each reason for which parents are left alone."""
    reasons: Counter[str] = Counter()
    for group in groups:
        if group.parent.role is not Role.ORDINARY:
            reasons[f"it is {group.parent.role.value}"] += 1
        elif group.reaps is Reaps.NO:
            reasons["the first process, which would get its zombies, doesn't reap them"] += 1
    return [f"Leave {count} parents alone: {reason}." for reason, count in reasons.items()]


def why_no_restart(facts: PodFacts, max_grace: float) -> str:
    """Why a container may not be restarted; empty where it may.

    max_grace: seconds; a tenant may ask for any time to stop, and half a stop is worse than none.
    """
    if facts.restart_policy == "Always":
        if facts.grace is not None and facts.grace > max_grace:
            return (
                f"its pod asks for {facts.grace:g} s to stop "
                f"(terminationGracePeriodSeconds), more than max_stop_grace ({max_grace:g} s)"
            )
        return ""
    if facts.restart_policy:
        return f"its pod's restartPolicy is {facts.restart_policy}, so it would not come back"
    return f"its pod's restartPolicy is not known ({facts.why_unknown or 'nobody could be asked'})"
