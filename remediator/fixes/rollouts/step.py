"""A step's memory: what it is about to change, kept in the step log before it changes it."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from exporter.checks.objects import Deployment, ReplicaSet
from exporter.logs import get_logger
from remediator.fixes.rollouts.look import Look
from remediator.model import Steps

log = get_logger("remediator.rollouts")

T = TypeVar("T")


class Taken(msgspec.Struct, frozen=True):
    """One old ReplicaSet that a step scales down, as kept in the step log."""

    name: str
    uid: str
    before: int
    after: int
    available: int
    """How many of its pods were available before."""


class Open(msgspec.Struct, frozen=True):
    """A step that was begun and not yet seen to end: what an undo needs, after a crash too."""

    deployment: str
    """uid"""
    newest: str
    """uid of the newest ReplicaSet"""
    newest_name: str
    newest_replicas: int
    come_up: tuple[str, ...]
    """uids of its pods that were available before"""
    taken: tuple[Taken, ...]
    nodes: tuple[str, ...]
    """Where its pods were: the room to give back in an undo."""
    costs: dict[str, str | None] = {}
    """The pod deletion costs that were overwritten, by pod uid."""
    generation: int = 0
    """The Deployment's, 0 where an older version of this program didn't note it."""
    serving: int = 0
    """How many pods of all its ReplicaSets were available before."""

    def overtaken(self, deployment: Deployment) -> bool:
        """Whether somebody has changed the Deployment since.

        Its controller then spreads the pods over the ReplicaSets anew, so that the numbers above
        no longer say what would be right.
        """
        return bool(self.generation) and deployment.generation != self.generation


class Left(msgspec.Struct):
    """What a dead owner left behind."""

    begun: Open | None = None
    """The step that neither came up nor was undone."""
    holder: str = ""
    deployment: str = ""
    newest: str = ""
    """Its claim: who, and on which uids."""


def left_open(steps: Steps) -> Left:
    left = Left()
    for step in steps.earlier:
        if step.name == "claim":
            left = msgspec.convert({**step.data, "begun": None}, Left, strict=False)
        elif step.name == "free":
            left.begun = msgspec.convert(step.data, Open, strict=False)
        elif step.name in {"come-up", "undo"} and step.ok:
            left.begun = None
    return left


class GaveUpError(Exception):
    """A step can't succeed; the message says why, `code` is the remediation's reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def newest_of(found: Look) -> ReplicaSet | None:
    """The ReplicaSet of the Deployment's current revision."""
    revision = found.deployment.revision
    same = [s for s in found.view.sets_of(found.deployment) if revision and s.revision == revision]
    return same[0] if len(same) == 1 else None


async def noted(steps: Steps, name: str, message: str, work: Callable[[], Awaitable[str]]) -> str:
    """A step that makes something whole: done even where it can't be recorded.

    `work` gives the step's result, which is passed on.
    """
    results: list[str] = []
    try:
        async with steps.step(name, message) as step:
            results.append(await work())
            step.result = results[0]
    except Exception:
        log.exception("a step can't be recorded", step=name)
    return results[0] if results else await work()
