"""Alertmanager's webhook message, version 4, to requests.

A message carries a whole group; one alert that can't be used doesn't lose the others. Labels are
untrusted: they only choose a fix by its name and locate a target.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256

import msgspec

from remediator.matchers import Matcher
from remediator.model import Request, TargetError, target_from_labels

OUTCOMES = (
    "accepted",
    "resolved",
    "other_node",
    "other_cluster",
    "not_for_us",
    "fix_off",
    "invalid",
    "truncated",
)
"""What may become of an alert: the label `outcome` of upkeep_webhook_alerts_total."""

_REMEMBERED = 2048  # bytes of an alert that is remembered; a larger one is read anew
_MOST = 1_000_000_000  # alerts left out; JSON's numbers have no end, a counter's have
_VALUES = 3_000_000  # ten times those of 20,000 alerts; each may take 100 bytes of memory
_LONGEST = 256  # characters of an alert's name or fingerprint that are kept


class MessageError(ValueError):
    """The body will never be right; the sentence says why."""


class _Alert(msgspec.Struct, frozen=True, rename="camel"):
    status: str
    labels: dict[str, str]
    starts_at: datetime
    fingerprint: str = ""


class _Message(msgspec.Struct, frozen=True, rename="camel"):
    version: str
    alerts: list[msgspec.Raw]
    truncated_alerts: int = 0


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """A message as the engine sees it."""

    requests: Sequence[Request]
    outcomes: Mapping[str, int]
    """How many alerts came to which of OUTCOMES."""
    problems: Sequence[str] = ()
    """A sentence for each alert that can't be used (the first few)."""


_Outcome = tuple[str, Request | None, str]
"""One of OUTCOMES, the request where there is one, the problem where there is one."""

_message = msgspec.json.Decoder(_Message)
_alert = msgspec.json.Decoder(_Alert)


class Reader:
    """Turns messages into requests for the fixes of this remediator."""

    def __init__(
        self,
        *,
        target_labels: Mapping[str, tuple[str, ...]],
        enabled: Callable[[str], bool],
        node: str,
        cluster: str = "",
        matchers: Sequence[Matcher] = (),
    ) -> None:
        """`target_labels`: by fix, which labels make its target."""
        self._target_labels = target_labels
        self._enabled = enabled
        self._node = node
        self._cluster = cluster
        self._matchers = tuple(matchers)
        # Alertmanager repeats its groups word for word: most alerts have been read before.
        self._read_again = lru_cache(maxsize=2048)(self._read_alert)

    def read(self, body: bytes) -> Read:
        """The requests of one message; `MessageError` where the whole of it can't be used."""
        message = _decode(body)
        outcomes: dict[str, int] = {}
        if message.truncated_alerts > 0:
            outcomes["truncated"] = min(message.truncated_alerts, _MOST)
        requests, problems = [], []
        for raw in message.alerts:
            alert = bytes(raw)
            read = self._read_again if len(alert) <= _REMEMBERED else self._read_alert
            outcome, request, problem = read(alert)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if request is not None:
                requests.append(request)
            if problem:
                problems.append(problem)
        return Read(requests=requests, outcomes=outcomes, problems=problems[:5])

    def _read_alert(self, raw: bytes) -> _Outcome:
        try:
            alert = _alert.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return "invalid", None, f"an alert can't be read: {error}"
        labels: Mapping[str, str] = alert.labels
        fix = labels.get("remediation", "")
        if fix not in self._target_labels:
            matcher = next((m for m in self._matchers if m.matches(labels)), None)
            if matcher is None:
                return "not_for_us", None, ""
            fix, labels = matcher.fix, matcher.target_labels(labels)
        if self._cluster and labels.get("cluster", self._cluster) != self._cluster:
            return "other_cluster", None, ""
        return self._request(fix, labels, alert)

    def _request(self, fix: str, labels: Mapping[str, str], alert: _Alert) -> _Outcome:
        try:
            target = target_from_labels(labels, self._target_labels[fix])
        except TargetError as error:
            return "invalid", None, f"{fix}: {error}"
        if target.node and target.node != self._node:
            return "other_node", None, ""
        if not self._enabled(fix):
            return "fix_off", None, ""
        if alert.status not in ("firing", "resolved"):
            return "invalid", None, f"{fix}: the alert's status is neither firing nor resolved"
        if problem := _unusable(alert.starts_at):
            return "invalid", None, f"{fix}: the alert's startsAt {problem}"
        firing = alert.status == "firing"
        request = Request(
            fix=fix,
            target=target,
            fingerprint=alert.fingerprint[:_LONGEST] or _fingerprint(alert.labels),
            alert=labels.get("alertname", "")[:_LONGEST],
            starts_at=alert.starts_at,
            firing=firing,
        )
        return ("accepted" if firing else "resolved"), request, ""


def _unusable(moment: datetime) -> str:
    """Why the journal, which keeps UTC, couldn't give it back; empty where it can."""
    if moment.tzinfo is None:
        return "has no time zone"
    try:
        year = moment.astimezone(UTC).year
    except OverflowError:
        year = 9999
    return "is in no year from 1 to 9998" if year == 9999 else ""


def _decode(body: bytes) -> _Message:
    if body.count(b",") > _VALUES:
        raise MessageError(f"the message holds more than {_VALUES} values; is it Alertmanager's?")
    try:
        message = _message.decode(body)
    except msgspec.ValidationError as error:
        raise MessageError(f"the body is no Alertmanager message: {error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MessageError(f"the body is not JSON: {error}") from None
    _known(message.version)
    return message


def _known(version: str) -> None:
    if version != "4":
        raise MessageError('the message\'s version is not "4"; is it from Alertmanager?')


def _fingerprint(labels: Mapping[str, str]) -> str:
    """For senders that give none: the same label set, the same fingerprint."""
    text = msgspec.json.encode(labels, order="sorted")
    return sha256(text).hexdigest()[:16]
