"""Whether a fix may act on a target now. One place, pure, and never without the reason.

`before_check` holds what needs no look at the target: nothing is read of what may not be touched.
`after_check` holds the rest, in an order in which the first refusal is the most lasting one.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from remediator import windows
from remediator.config import FixPolicy, Mode, OptOut, listed
from remediator.journal import Act, Instant, Pause
from remediator.model import Condition, Decision, Origin, Phase, Remediation, Target, Verdict

REFUSALS = (
    "ConditionCleared",
    "CheckFailed",
    "OptedOut",
    "Paused",
    "StormBreaker",
    "PreviousFailed",
    "Cooldown",
    "DryRun",
    "Expired",
    "AlertResolved",
    "FixOff",
    "OwnerDied",
    "Locked",
    "ByHand",
    "Interrupted",
)
"""Every reason for which the engine itself skips, beside those of a fix's own check."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the decision rests on, read just before it."""

    policy: FixPolicy
    opt_out: OptOut
    dry_run: bool
    """The daemon as a whole may not act."""
    now: Instant
    pause: Pause | None
    acts: Sequence[Act] = ()
    """Of this fix, newest first, the remediation to be decided left out."""


def before_check(remediation: Remediation, facts: Facts) -> Decision | None:
    """A refusal that stands whatever a check would find; None where there is none."""
    if facts.policy.mode is Mode.OFF and remediation.origin is Origin.ALERT:
        return _refuse("FixOff", f"The configuration has {remediation.fix} off.")
    if entry := _opted_out(facts.opt_out, remediation.target):
        return _refuse("OptedOut", f"The configuration's opt_out.{entry} covers the target.")
    if remediation.origin is Origin.ALERT and facts.pause is not None:
        return _paused(facts.pause)
    return None


def after_check(remediation: Remediation, condition: Condition, facts: Facts) -> Decision:
    """Admit, wait or refuse, now that the condition was seen."""
    if not condition.broken:
        return _refuse(condition.reason, condition.message)
    if condition.opted_out:
        return _refuse("OptedOut", condition.opted_out)
    by_hand = remediation.origin is Origin.HAND
    if not by_hand:
        refusal = _cooldown(remediation.target, condition, facts) or _storm(facts)
        if refusal is not None:
            return refusal
    if facts.dry_run or facts.policy.mode is Mode.DRY_RUN:
        would = "; ".join(sentence.rstrip(".") for sentence in condition.plan) or "act"
        found = condition.message.rstrip(".")
        return _refuse("DryRun", f"{found}. Dry run, nothing done. Would: {would}.")
    if by_hand:
        return _admit("ByHand", condition)
    return _wait(remediation, facts) or _admit("Admitted", condition)


def _admit(reason: str, condition: Condition) -> Decision:
    return Decision(verdict=Verdict.ADMIT, reason=reason, message=condition.message)


def _refuse(reason: str, message: str, until: datetime | None = None) -> Decision:
    return Decision(verdict=Verdict.REFUSE, reason=reason, message=message, until=until)


def _paused(pause: Pause) -> Decision:
    return _refuse(
        pause.reason,
        f"{pause.fix} is paused since {_at(pause.since)} by {pause.by}: {pause.why} "
        f"Until `upkeep-remediator resume {pause.fix}`.",
    )


def _opted_out(opt_out: OptOut, target: Target) -> str:
    """Which local list names the target, as `nodes: pattern`; empty where none does."""
    named = (
        ("nodes", opt_out.nodes, target.node),
        ("namespaces", opt_out.namespaces, target.namespace),
        ("pods", opt_out.pods, f"{target.namespace}/{target.pod}" if target.pod else ""),
        (
            "deployments",
            opt_out.deployments,
            f"{target.namespace}/{target.deployment}" if target.deployment else "",
        ),
    )
    for kind, patterns, name in named:
        if name and (pattern := listed(patterns, name)):
            return f"{kind} ({pattern!r})"
    return ""


def _cooldown(target: Target, condition: Condition, facts: Facts) -> Decision | None:
    rest = float(facts.policy.cooldown)
    if not rest:
        return None
    for act in facts.acts:
        same = act.target == target
        kin = bool(condition.workload) and act.workload == condition.workload
        if not (same or kin):
            continue
        if not act.phase.terminal:  # of another target: two of one are never active
            return _refuse(
                "Cooldown",
                f"The fix is acting on its workload {condition.workload} now ({act.id}, "
                f"{act.phase}); its cooldown of {_span(rest)} begins when that has ended.",
            )
        elapsed = act.at.elapsed(facts.now)
        if elapsed < rest:
            until = _wall(facts.now) + timedelta(seconds=rest - elapsed)
            what = "it" if same else f"its workload {condition.workload}"
            return _refuse(
                "Cooldown",
                f"The fix acted on {what} {_span(elapsed)} ago ({act.id}, {act.phase}); "
                f"its cooldown of {_span(rest)} ends {_at(until)}.",
                until,
            )
    return None


def _storm(facts: Facts) -> Decision | None:
    span, most = float(facts.policy.window), facts.policy.max_acts
    recent = [a for a in facts.acts if a.counted and a.admitted.elapsed(facts.now) < span]
    if len(recent) < most:
        return None
    return _refuse(
        "StormBreaker",
        f"{len(recent)} acts within {_span(span)} are as many as max_acts allows: that may be a "
        "broken rule and not broken targets. Until a person resumes the fix.",
    )


def _wait(remediation: Remediation, facts: Facts) -> Decision | None:
    now = _wall(facts.now)
    if facts.policy.mode is Mode.APPROVAL and not remediation.approved_by:
        return Decision(
            verdict=Verdict.WAIT,
            reason="NeedsApproval",
            message=f"Waits for `upkeep-remediator approve {remediation.id}`.",
        )
    places = facts.policy.maintenance_windows
    if windows.open_at(places, now):
        return None
    opens = windows.next_opening(places, now)
    return Decision(
        verdict=Verdict.WAIT,
        reason="OutsideWindow",
        message=f"Outside the maintenance windows; the next one opens {_at(opens)}.",
        until=opens,
    )


def expired(remediation: Remediation, now: datetime) -> Decision | None:
    """Give up what has waited too long; what a person approved in time only waits for a window."""
    if remediation.approved_by or remediation.expires_at is None or now < remediation.expires_at:
        return None
    waited = now - remediation.created_at
    return _refuse(
        "Expired",
        f"It waited {_span(waited.total_seconds())} ({remediation.reason}) and was given up.",
    )


def pauses_after(remediation: Remediation, phase: Phase, policy: FixPolicy) -> str:
    """Why the fix pauses now that `remediation` ended in `phase`; empty where it doesn't."""
    if phase is not Phase.FAILED or not policy.pause_after_failure:
        return ""
    return f"{remediation.id} failed on {remediation.target}, and pause_after_failure is set."


def _wall(now: Instant) -> datetime:
    return datetime.fromtimestamp(now.wall, UTC)


def _at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _span(seconds: float) -> str:
    whole = int(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole >= size:
            rest = whole % size
            smaller = {"d": (3600, "h"), "h": (60, "m"), "m": (1, "s")}[unit]
            tail = f" {rest // smaller[0]} {smaller[1]}" if rest // smaller[0] else ""
            return f"{whole // size} {unit}{tail}"
    return f"{whole} s"
