"""Changes of the SQLite journal that take more than a statement, within a transaction.

Each raises `ConflictError` before it has written anything, so that the others of its transaction
are kept.
"""

# ruff: noqa: S608 - what is put into SQL text are constants of these modules, never values

import sqlite3
from collections.abc import Mapping, Sequence

from remediator.journal import ConflictError, rows
from remediator.model import Claim, Phase, Remediation

# What the storm breaker lets pass was admitted as one of the acts that are allowed.
NOT_PAUSED = (
    "(origin = 'hand' OR NOT EXISTS (SELECT 1 FROM pauses "
    "WHERE pauses.fix = remediations.fix AND pauses.reason <> 'StormBreaker'))"
)


def merge_refusal(  # noqa: PLR0917 - in the order of `finish`
    connection: sqlite3.Connection,
    remediation_id: str,
    claim: Claim | None,
    reason: str,
    message: str,
    now: float,
) -> Remediation | None:
    """Fold a repeated refusal into the record of the last one; None where there is none."""
    mine = one(connection, remediation_id)
    if mine.phase.terminal or mine.started_at is not None or mine.claim != claim:
        return None
    earlier = connection.execute(
        "SELECT id, phase, reason FROM remediations WHERE fix = ? AND target = ? AND seq < "
        "(SELECT seq FROM remediations WHERE id = ?) ORDER BY seq DESC LIMIT 1",
        (mine.fix, mine.target.key, remediation_id),
    ).fetchone()
    if earlier is None or earlier["phase"] != Phase.SKIPPED or earlier["reason"] != reason:
        return None
    connection.execute("DELETE FROM remediations WHERE id = ?", (remediation_id,))
    connection.execute(
        "UPDATE remediations SET count = count + ?, last_seen_at = ?, ended_at = ?, message = ? "
        "WHERE id = ?",
        (mine.count, now, now, message, earlier["id"]),
    )
    return one(connection, earlier["id"])


def one(connection: sqlite3.Connection, remediation_id: str) -> Remediation:
    row = connection.execute(
        f"SELECT {rows.COLUMNS} FROM remediations WHERE id = ?",
        (remediation_id,),
    ).fetchone()
    if row is None:
        raise ConflictError(f"there is no remediation {remediation_id}")
    return rows.remediation(row, rows.steps_of(connection, remediation_id))


def pause(  # noqa: PLR0917 - in the order of the columns
    connection: sqlite3.Connection, fix: str, since: float, by: str, why: str, reason: str
) -> bool:
    """False where it is paused already, which stays as it is."""
    done = connection.execute(
        "INSERT INTO pauses (fix, since, by, why, reason) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (fix) DO NOTHING",
        (fix, since, by, why, reason),
    )
    return done.rowcount == 1


def change(  # noqa: PLR0917 - in the order of the statement it makes
    connection: sqlite3.Connection,
    assignments: str,
    values: Sequence[object],
    remediation_id: str,
    where: str,
    where_values: Sequence[object] = (),
) -> None:
    """Compare and set; `ConflictError` where the remediation isn't in the state it must be in."""
    done = connection.execute(
        f"UPDATE remediations SET {assignments} WHERE id = ? AND {where}",
        (*values, remediation_id, *where_values),
    )
    if done.rowcount != 1:
        found = one(connection, remediation_id)
        approved = f", approved by {found.approved_by}" if found.approved_by else ""
        expires = ""
        if found.expires_at is not None and not found.phase.terminal:
            expires = f", expires {found.expires_at:%Y-%m-%d %H:%M:%S} UTC"
        claimed = f", claimed by process {found.claim.pid}" if found.claim else ""
        raise ConflictError(
            f"{remediation_id} is {found.phase} ({found.reason}){approved}{expires}{claimed}"
        )


def give_way(connection: sqlite3.Connection, remediation_id: str, why: str, now: float) -> None:
    """End one that waits because a person doesn't."""
    connection.execute(
        "UPDATE remediations SET phase = 'Skipped', reason = 'ByHand', message = ?, ended_at = ?, "
        "due_at = NULL WHERE id = ? AND phase = 'Pending'",
        (f"{rows.text(why)}, which took its place.", now, remediation_id),
    )


def resume(connection: sqlite3.Connection, fix: str, by: str, now: float) -> bool:
    """False where it wasn't paused. What was admitted so far counts towards no storm any more."""
    done = connection.execute("DELETE FROM pauses WHERE fix = ?", (fix,))
    if done.rowcount == 0:
        return False
    connection.execute(
        "INSERT INTO resumed (fix, seq, by, at) "
        "VALUES (?, (SELECT coalesce(max(seq), 0) FROM remediations WHERE fix = ? "
        "AND admitted_json IS NOT NULL), ?, ?) "
        "ON CONFLICT (fix) DO UPDATE SET seq = excluded.seq, by = excluded.by, "
        "at = excluded.at",
        (fix, fix, by, now),
    )
    return True


def prune(
    connection: sqlite3.Connection,
    before: float,
    max_records: int,
    since: Mapping[str, str | float],
) -> int:
    """Drop some of what is older than `before` (seconds since 1970) or in excess; how many.

    What acted `since` (see `rows.since`) is what cooldowns and storm limits are counted from.
    """
    lately = f"({rows.ACTED} AND (({rows.THIS_BOOT}) OR ({rows.EARLIER_BOOT})))"
    done = connection.execute(
        "DELETE FROM remediations WHERE seq IN (SELECT seq FROM remediations "
        f"WHERE ended_at < :before AND last_seen_at < :before AND NOT {lately} LIMIT 500)",
        {"before": before, **since},
    ).rowcount
    ended = connection.execute(
        "SELECT count(*) FROM remediations WHERE ended_at IS NOT NULL"
    ).fetchone()[0]
    done += connection.execute(
        "DELETE FROM remediations WHERE seq IN (SELECT seq FROM remediations "
        f"WHERE ended_at IS NOT NULL AND NOT {lately} "
        "ORDER BY phase <> 'Skipped', seq LIMIT :excess)",
        {"excess": min(500, max(0, ended - max_records)), **since},
    ).rowcount
    return done
