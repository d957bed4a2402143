"""The remediator's vocabulary: what a remediation is, and what a fix must be able to do.

Everything else here speaks in these values: the webhook makes `Request`s, the journal stores
`Remediation`s, the policy looks at a `Condition` and the worker drives a `Fix`. They are frozen, so
a decision can be logged, shown and tested as the value it is.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from itertools import count
from typing import Any, Protocol

import msgspec

from exporter.logs import get_logger

log = get_logger("remediator.steps")


class Phase(StrEnum):
    """Where a remediation stands. Terminal phases never change."""

    PENDING = "Pending"  # accepted durably; not yet checked, or waits for approval or a window
    ADMITTED = "Admitted"  # the condition was seen and the policy said yes
    RUNNING = "Running"  # claimed by one live executor, which may be acting right now
    SUCCEEDED = "Succeeded"  # acted, and seen to be healed
    FAILED = "Failed"  # acted or tried to, and not seen to be healed; the message says how it ended
    SKIPPED = "Skipped"  # nothing was done; the reason says which rule or fact was against it

    @property
    def terminal(self) -> bool:
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.SKIPPED)


# RFC 1123 names as Kubernetes bounds them. Labels are untrusted: what doesn't look like a name of
# a Kubernetes object can't locate one.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class TargetError(ValueError):
    """The labels don't locate a target; the sentence names the label and the remedy."""


class Target(msgspec.Struct, frozen=True, order=True, kw_only=True, cache_hash=True):
    """What one fix acts on. Unused parts are empty; `key` is its one canonical spelling."""

    node: str = ""
    namespace: str = ""
    pod: str = ""
    container: str = ""
    deployment: str = ""

    @property
    def key(self) -> str:
        """`node/N`, `node/N/pod/NAMESPACE/POD/CONTAINER` or `deployment/NAMESPACE/NAME`."""
        if self.deployment:
            return f"deployment/{self.namespace}/{self.deployment}"
        if self.pod or self.container or self.namespace:
            return f"node/{self.node}/pod/{self.namespace}/{self.pod}/{self.container}"
        return f"node/{self.node}"

    def __str__(self) -> str:
        if self.deployment:
            return f"deployment {self.namespace}/{self.deployment}"
        if self.pod or self.container:
            where = f"container {self.container} of pod {self.namespace}/{self.pod}"
            return f"{where} on node {self.node}"
        return f"node {self.node}"


def target_from_labels(labels: Mapping[str, str], names: Sequence[str]) -> Target:
    """Make a target of exactly the labels `names`; `TargetError` where one is absent or no name."""
    return _target(tuple(names), tuple([labels.get(name, "") for name in names]))


@lru_cache(maxsize=8192)  # ten alerts a message, thousands of messages, the same few targets
def _target(names: tuple[str, ...], values: tuple[str, ...]) -> Target:
    found: dict[str, str] = {}
    for name, value in zip(names, values, strict=True):
        if not value:
            raise TargetError(
                f"the alert has no label {name!r}; keep it in the rule's expression and in group_by"
            )
        if not _NAME.fullmatch(value):
            raise TargetError(f"the alert's label {name!r} is not the name of a Kubernetes object")
        found[name] = value
    return Target(**found)


class Request(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """One alert that asks for one fix on one target, as the webhook understood it."""

    fix: str
    target: Target
    fingerprint: str
    """Alertmanager's hash of the label set: the same alert has it again in its next episode."""
    alert: str
    """The alert's name, for people."""
    starts_at: datetime
    firing: bool
    """False: it has resolved, which is only a hint."""


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """An alert that was coalesced into a remediation."""

    fingerprint: str
    name: str
    starts_at: datetime
    resolved: bool


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which process executes a remediation; a process id alone is reused after its death."""

    boot_id: str
    pid: int
    start_time: int
    """Clock ticks since boot, field 22 of /proc/PID/stat."""
    takeovers: int = 0
    """How often the remediation was taken over from an owner that had died."""

    def same_process(self, other: "Claim") -> bool:
        """Whether both name one process, whatever it had taken over."""
        mine, theirs = (msgspec.structs.replace(c, takeovers=0) for c in (self, other))
        return mine == theirs


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found, now. The same check serves the decision and the verification."""

    broken: bool
    """True where the fix would act within its own limits."""
    reason: str
    """A code in CamelCase. Where not broken: why not (`ConditionCleared`, `BelowActLimit`, …)."""
    message: str
    """The same in one sentence a person understands."""
    identities: frozenset[str] = frozenset()
    """What would be acted on (`pid:start time`, serial, pod uid): gone when healed."""
    plan: tuple[str, ...] = ()
    """What `apply` would do, a sentence each; a dry run shows these."""
    opted_out: str = ""
    """Which annotation or list entry forbids acting on the target, as a sentence; empty if none."""
    workload: str = ""
    """What outlives the target and comes back with it (a pod's controller); empty if unknown."""
    detail: Any = None
    """The fix's own finding, handed on to `apply`; never stored."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded step. It is written once when it begins and again when it ends."""

    name: str
    message: str
    started_at: datetime
    ended_at: datetime | None = None
    ok: bool | None = None
    """None while it runs, or where its owner died in it."""
    result: str = ""
    data: dict[str, Any] = {}
    """What is needed to resume or undo it after a crash (JSON types only, never a secret)."""

    @property
    def seconds(self) -> float | None:
        """How long it took; None where it hasn't ended."""
        return None if self.ended_at is None else (self.ended_at - self.started_at).total_seconds()


class Verdict(StrEnum):
    """What the policy says of acting now."""

    ADMIT = "admit"
    WAIT = "wait"  # stays Pending until a person or a window lets it act, or it expires
    REFUSE = "refuse"  # Skipped; the alert will offer it again


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The policy's word, never without its reason."""

    verdict: Verdict
    reason: str
    message: str
    """Names the rule and, where it ends by itself, until when."""
    until: datetime | None = None


class Origin(StrEnum):
    """Who asked for a remediation."""

    ALERT = "alert"
    HAND = "hand"  # `upkeep-remediator run`


class Remediation(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of one fix on one target, as the journal knows it. Times are UTC."""

    id: str
    """`<webhook request>-<number of the alert in it>`: one id from the webhook to the last step."""
    fix: str
    target: Target
    origin: Origin
    phase: Phase
    reason: str
    message: str
    created_at: datetime
    last_seen_at: datetime
    """When the same refusal of the same target was last repeated."""
    count: int = 1
    """How often the same refusal came, this one included."""
    due_at: datetime | None = None
    """When a waiting one is looked at again."""
    expires_at: datetime | None = None
    """When a waiting one is given up."""
    approved_by: str = ""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    claim: Claim | None = None
    condition: Condition | None = None
    """What was about to be acted on, without its `detail`; None before it ran."""
    steps: tuple[Step, ...] = ()
    alerts: tuple[Alert, ...] = ()


# A block of PEM; a key or token in base64, which is longer than any digest.
_SECRET = re.compile(r"-----BEGIN .*?(?:-----END [^-]*-----|\Z)|[A-Za-z0-9+/=]{65,}", re.DOTALL)


def in_words(error: BaseException) -> str:
    """An error for the record, without what may be a secret: anything may stand in its text."""
    text = _SECRET.sub("(left out)", str(error))
    return f"{type(error).__name__}: {text[:1000]}"


class StepHandle:
    """Given to the body of a step, to say how it came out and to keep what an undo needs."""

    def __init__(self) -> None:
        self.result = ""
        self.data: dict[str, Any] = {}


class Steps:
    """The durable step log of one remediation, on the node that acts.

    `record(index, step)` must have committed when it returns: a step is on disk before its first
    side effect, and its end before the next step begins.
    """

    def __init__(
        self,
        record: Callable[[int, Step], Awaitable[None]],
        now: Callable[[], datetime],
        earlier: Sequence[Step] = (),
    ) -> None:
        self._record = record
        self._now = now
        self.earlier = tuple(earlier)
        """Steps of a previous owner that died while it ran, oldest first."""
        self._numbers = count(len(self.earlier))

    def unfailing(self) -> "Steps":
        """The same log for a way back, which is gone to its end whether it's recorded or not."""

        async def record(index: int, step: Step) -> None:
            try:
                await self._record(index, step)
            except Exception:
                log.exception("a step can't be recorded", step=step.name, ok=step.ok)

        same = Steps(record, self._now, self.earlier)
        same._numbers = self._numbers  # no step of either takes the place of one of the other
        return same

    @asynccontextmanager
    async def step(self, name: str, message: str, **data: Any) -> AsyncIterator[StepHandle]:
        """Record the step, run the body, record how it ended.

        What the body raises passes on, whether that can be recorded or not: a cancellation or a
        fix's own words are not to be lost to a full disk.
        """
        index = next(self._numbers)
        handle = StepHandle()
        handle.data = dict(data)
        begun = Step(name=name, message=message, started_at=self._now(), data=dict(data))
        await self._record(index, begun)

        def ended(*, ok: bool) -> Step:
            return msgspec.structs.replace(
                begun, ended_at=self._now(), ok=ok, result=handle.result, data=handle.data
            )

        try:
            yield handle
        except BaseException as error:
            handle.result = handle.result or in_words(error)
            try:
                await self._record(index, ended(ok=False))
            except Exception:
                log.exception("how a step failed can't be recorded", step=name)
            raise
        await self._record(index, ended(ok=True))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How `apply` or `resume` ended, before the worker's own verification."""

    phase: Phase
    """Terminal: Succeeded, Failed or Skipped."""
    reason: str
    message: str


class CheckError(Exception):
    """The condition can't be known now, so nothing is done; the sentence says why."""


class FixError(Exception):
    """The fix ended without healing, in words, with everything it could undo undone."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Fix(Protocol):
    """One condition's remedy. It knows nothing of dry runs, cooldowns, queues or alerts."""

    @property
    def name(self) -> str:
        """As in the alerts' label `remediation`: `rotate-certificates`, …"""

    @property
    def deadline(self) -> float:
        """Seconds the worker gives `apply` before it cancels it; the fix then undoes."""

    @property
    def target_labels(self) -> tuple[str, ...]:
        """Which alert labels make its target."""

    @property
    def reasons(self) -> Mapping[Phase, tuple[str, ...]]:
        """Every reason it may give, by terminal phase: their metrics start at 0."""

    async def check(self, target: Target) -> Condition:
        """Look at the target itself, now. `CheckError` where it can't be known."""

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        """Act on exactly what `condition` names; `FixError` where it ends without healing."""

    async def verify(self, target: Target, condition: Condition) -> Condition:
        """Look again after `apply`: broken while any identity acted on, or the condition, is."""

    async def resume(self, target: Target, steps: Steps) -> Outcome:
        """A previous owner died while Running: look, then finish or undo; never blindly repeat."""
