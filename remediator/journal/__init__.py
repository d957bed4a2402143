"""The durable queue and history of remediations.

Everything the engine promises rests on what a journal commits: an accepted request survives any
death, at most one remediation is active for a fix and a target, a terminal phase never changes.
Those are the store's own invariants, not the callers' good manners. Two stores fit behind this
protocol, a SQLite file and Kubernetes resources, and one contract test suite runs on each.

Every method that changes something returns only after it is durable.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from remediator.model import (
    Claim,
    Condition,
    Decision,
    Phase,
    Remediation,
    Request,
    Step,
    Target,
)

LONGEST_WAIT = 60.0
"""Seconds within which every waiting remediation is looked at again."""


class JournalError(Exception):
    """The journal can't be used now: nothing was changed. The sentence says why."""


class ConflictError(Exception):
    """The remediation is no longer in the state the caller saw; the sentence says what it is."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the requests of one webhook message."""

    created: int = 0
    """New remediations."""
    coalesced: int = 0
    """Alerts that joined an active remediation."""
    resolved: int = 0
    """Alerts that say they have resolved."""
    cancelled: tuple[tuple[str, str], ...] = ()
    """Id and fix of what was given up, not yet running, because all its alerts have resolved."""


class Instant(msgspec.Struct, frozen=True, kw_only=True):
    """A moment on both clocks, so that a step of the wall clock can't shorten a cooldown."""

    wall: float
    """Seconds since 1970."""
    boot_id: str
    boottime: float
    """Seconds since boot."""

    def elapsed(self, now: "Instant") -> float:
        """Seconds from here to `now`: on the boot clock within one boot, else on the wall clock.

        What was before this boot is at least as old as the boot, whatever the wall clock said.
        """
        if self.boot_id == now.boot_id:
            return max(0.0, now.boottime - self.boottime)
        return max(now.boottime, now.wall - self.wall)


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """A remediation that acts or acted: what cooldowns and storm limits count."""

    id: str
    target: Target
    phase: Phase
    reason: str
    workload: str
    at: Instant
    """When it was admitted; once it has ended, when it ended."""
    admitted: Instant
    counted: bool
    """False where a person has resumed the fix since: it no longer counts towards a storm."""


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """A fix that acts no more until a person resumes it."""

    fix: str
    since: datetime
    by: str
    """A person's name, or the rule that paused it."""
    why: str
    reason: str
    """`Paused`, `StormBreaker` or `PreviousFailed`: the reason code of its refusals."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What the metrics show of the journal."""

    active: Mapping[tuple[str, Phase], int]
    last: Mapping[tuple[str, Phase], datetime]
    """When a remediation of that fix last ended in that phase."""
    pauses: Sequence[Pause]


class Journal(Protocol):
    """The durable queue and history. Raises `JournalError` where it can't be used."""

    async def accept(self, requests: Sequence[Request], request_id: str) -> Accepted:
        """Commit the requests of one webhook message, in order, all or none.

        A firing one joins the active remediation of its fix and target, or makes a Pending one.
        A resolved one marks its alert; a remediation all of whose alerts have resolved is
        cancelled unless it runs.
        """

    async def begin(
        self,
        fix: str,
        target: Target,
        remediation_id: str,
        by: str,
        claim: Claim,
        *,
        instead: bool = False,
    ) -> Remediation:
        """Make an Admitted remediation asked for by hand, claimed by the process that runs it.

        `ConflictError` where one is active. instead: one that only waits gives its place to it.
        """

    async def get(self, remediation_id: str) -> Remediation | None:
        """One remediation with its steps and alerts; an unambiguous beginning of the id will do."""

    async def find(
        self,
        *,
        fix: str = "",
        phase: Phase | None = None,
        target: str = "",
        limit: int = 100,
    ) -> list[Remediation]:
        """Newest first, without steps, alerts, condition. `target`: a part of the target's key."""

    async def due(self, fix: str, limit: int) -> list[Remediation]:
        """What is Running, Admitted, or Pending and due, in this order, oldest first, with steps.

        What waits only to be looked at again, for approval or a window, comes after what is new or
        was approved.

        What is due later than LONGEST_WAIT from now is due too: the clock was set back meanwhile.
        """

    async def acts(self, fix: str, horizon: float) -> list[Act]:
        """Newest first: what is Admitted, Running, or acted within `horizon` seconds.

        As `Instant.elapsed` counts them: no step of the wall clock hides an act.
        """

    async def wait(
        self, remediation_id: str, decision: Decision, *, due_in: float, expires_in: float
    ) -> None:
        """Keep one waiting as Pending; its expiry is set once, by the first wait.

        due_in: LONGEST_WAIT or less, and expires_in, in seconds.
        """

    async def admit(self, remediation_id: str, decision: Decision, workload: str = "") -> None:
        """Pending -> Admitted, to act on that workload."""

    async def claim(
        self, remediation_id: str, claim: Claim, condition: Condition | None, previous: Claim | None
    ) -> Remediation:
        """Admitted -> Running, or take over from `previous` whose owner is dead; with its steps.

        `ConflictError` where the fix was paused before it began, but by the storm breaker or where
        it was asked for by hand.
        """

    async def record_step(self, remediation_id: str, claim: Claim, index: int, step: Step) -> None:
        """Write one step of a Running remediation; `ConflictError` where another claimed it."""

    async def finish(
        self,
        remediation_id: str,
        phase: Phase,
        reason: str,
        message: str,
        *,
        claim: Claim | None = None,
        pause: Pause | None = None,
    ) -> Remediation:
        """End it. The same refusal of the same target as last time updates that record instead.

        claim: the claim on it as its caller knows it, None where there was none; `ConflictError`
        where that is another by now.
        pause: what its end pauses, durable with it or not at all; a pause that is there stays.
        """

    async def approve(self, remediation_id: str, by: str) -> Remediation:
        """Let a Pending one act without waiting for approval any more.

        `ConflictError` where it's too late for that.
        """

    async def pause(self, fix: str, by: str, why: str, reason: str = "Paused") -> bool:
        """Stop a fix from acting; False where it is paused already, which stays as it is."""

    async def resume(self, fix: str, by: str) -> bool:
        """Let a fix act again and forget the storm; False where it wasn't paused."""

    async def pauses(self) -> list[Pause]:
        """What is paused, by fix."""

    async def counts(self) -> Counts:
        """What the metrics show."""

    async def prune(self, *, max_age: float, max_records: int, horizon: float = 0.0) -> int:
        """Drop ended ones older than `max_age` seconds or in excess; how many were dropped.

        What acted within `horizon` seconds stays, as `acts` counts them.
        """

    async def aclose(self) -> None:
        """Finish what was handed in and let go of the store."""
