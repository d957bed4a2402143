"""Rows of the SQLite journal to values and back."""

import sqlite3
from datetime import UTC, datetime

import msgspec

from remediator.journal import Act, Instant, Pause
from remediator.model import (
    Alert,
    Claim,
    Condition,
    Origin,
    Phase,
    Remediation,
    Step,
    Target,
)

COLUMNS = (
    "id, fix, target_json, origin, phase, reason, message, count, created_at, last_seen_at, "
    "due_at, expires_at, approved_by, condition_json, claim_json, started_at, ended_at, seq"
)
# A condition may name ten thousand identities: too much for a list.
LIST_COLUMNS = COLUMNS.replace("condition_json", "NULL AS condition_json")
ACT_COLUMNS = "id, target_json, phase, reason, workload, admitted_json, ended_json, seq"

# What acted, and which of it did so within a horizon, as `Instant.elapsed` counts: see `since`.
ACTED = "phase IN ('Succeeded', 'Failed') AND started_at IS NOT NULL"
THIS_BOOT = "ended_json ->> 'boot_id' = :boot_id AND ended_json ->> 'boottime' >= :boottime"
EARLIER_BOOT = "ended_json ->> 'boot_id' <> :boot_id AND ended_at >= :wall AND :boottime < 0"

_encoder = msgspec.json.Encoder(order="sorted")
_target = msgspec.json.Decoder(Target)
_claim = msgspec.json.Decoder(Claim)
_condition = msgspec.json.Decoder(Condition)
_step = msgspec.json.Decoder(Step)
_instant = msgspec.json.Decoder(Instant)


def encode(value: msgspec.Struct) -> str:
    """JSON with sorted keys, so that equal values are equal text."""
    return _encoder.encode(value).decode()


def encode_condition(condition: Condition) -> str:
    """Without `detail`, which is the fix's own and may not be JSON."""
    message = text(condition.message)
    return encode(msgspec.structs.replace(condition, message=message, detail=None))


def encode_step(step: Step) -> str:
    words = {"message": text(step.message), "result": text(step.result)}
    return encode(msgspec.structs.replace(step, **words))


def text(words: str) -> str:
    """What people read. A file's name in some other encoding must not keep it from being written.

    Identities and what an undo needs are not passed through here: those that can't be written
    as they are forbid the act.
    """
    return words.encode("utf-8", "backslashreplace").decode()


def since(now: Instant, horizon: float) -> dict[str, str | float]:
    """The beginning of the last `horizon` seconds on each clock."""
    return {
        "boot_id": now.boot_id,
        "boottime": now.boottime - horizon,
        "wall": now.wall - horizon,
    }


def moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def remediation(
    row: sqlite3.Row, steps: tuple[Step, ...] = (), alerts: tuple[Alert, ...] = ()
) -> Remediation:
    return Remediation(
        id=row["id"],
        fix=row["fix"],
        target=_target.decode(row["target_json"]),
        origin=Origin(row["origin"]),
        phase=Phase(row["phase"]),
        reason=row["reason"],
        message=row["message"],
        count=row["count"],
        created_at=datetime.fromtimestamp(row["created_at"], UTC),
        last_seen_at=datetime.fromtimestamp(row["last_seen_at"], UTC),
        due_at=moment(row["due_at"]),
        expires_at=moment(row["expires_at"]),
        approved_by=row["approved_by"],
        started_at=moment(row["started_at"]),
        ended_at=moment(row["ended_at"]),
        claim=_claim.decode(row["claim_json"]) if row["claim_json"] else None,
        condition=_condition.decode(row["condition_json"]) if row["condition_json"] else None,
        steps=steps,
        alerts=alerts,
    )


def act(row: sqlite3.Row, resumed_seq: int) -> Act:
    admitted = _instant.decode(row["admitted_json"])
    ended = _instant.decode(row["ended_json"]) if row["ended_json"] else admitted
    return Act(
        id=row["id"],
        target=_target.decode(row["target_json"]),
        phase=Phase(row["phase"]),
        reason=row["reason"],
        workload=row["workload"],
        admitted=admitted,
        at=ended,
        counted=row["seq"] > resumed_seq,
    )


def pause(row: sqlite3.Row) -> Pause:
    return Pause(
        fix=row["fix"],
        since=datetime.fromtimestamp(row["since"], UTC),
        by=row["by"],
        why=row["why"],
        reason=row["reason"],
    )


def steps_of(connection: sqlite3.Connection, remediation_id: str) -> tuple[Step, ...]:
    rows = connection.execute(
        "SELECT step_json FROM steps WHERE remediation = ? ORDER BY number", (remediation_id,)
    )
    return tuple(_step.decode(row[0]) for row in rows)


def alerts_of(connection: sqlite3.Connection, seq: int) -> tuple[Alert, ...]:
    rows = connection.execute(
        "SELECT fingerprint, name, starts_at, resolved FROM alerts WHERE remediation = ? "
        "ORDER BY starts_at, fingerprint",
        (seq,),
    )
    return tuple(
        Alert(
            fingerprint=row[0],
            name=row[1],
            starts_at=datetime.fromtimestamp(row[2], UTC),
            resolved=bool(row[3]),
        )
        for row in rows
    )
