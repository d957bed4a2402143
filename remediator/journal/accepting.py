"""Requests of webhook messages into the SQLite journal: one statement for a whole batch of them.

The batch goes in as one JSON value, so SQLite works through it in one call, outside Python's lock.
"""

# ruff: noqa: S608 - what is put into SQL text are constants of these modules, never values

import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import msgspec

from remediator.journal import Accepted
from remediator.journal.schema import ACTIVE
from remediator.model import Request, Target

_MOST_KNOWN = 200_000  # alerts held in memory

Message = tuple[str, Sequence[Request]]
"""Id of the webhook request, and what it asked for."""

# id, fix, target, its JSON, fingerprint, alert, starts_at
_BATCH = """
WITH batch AS (SELECT key AS place, value ->> 0 AS id, value ->> 1 AS fix, value ->> 2 AS target,
    value ->> 3 AS target_json, value ->> 4 AS fingerprint, value ->> 5 AS alert,
    CAST(value ->> 6 AS REAL) AS starts_at FROM json_each(?))
"""
_INSERT = f"""
{_BATCH}
INSERT INTO remediations (id, fix, target, target_json, origin, phase, created_at, last_seen_at)
SELECT id, fix, target, target_json, 'alert', 'Pending', ?, ? FROM batch WHERE true ORDER BY place
ON CONFLICT (fix, target) WHERE {ACTIVE} DO NOTHING RETURNING id
"""
_JOIN = f"""
{_BATCH}
INSERT INTO alerts (remediation, fingerprint, name, starts_at, resolved)
SELECT seq, fingerprint, alert, starts_at, 0 FROM batch CROSS JOIN remediations AS r
    ON r.fix = batch.fix AND r.target = batch.target AND {ACTIVE} ORDER BY place
ON CONFLICT (remediation, fingerprint) DO UPDATE
SET starts_at = excluded.starts_at, resolved = 0 WHERE excluded.starts_at > starts_at
"""
# A resolved message of an earlier episode, delivered late, says nothing of the present one.
_RESOLVE = f"""
UPDATE alerts SET resolved = 1
WHERE fingerprint = ? AND starts_at <= ? AND resolved = 0 AND remediation =
    (SELECT seq FROM remediations WHERE fix = ? AND target = ? AND {ACTIVE})
"""
_CANCEL = """
UPDATE remediations SET phase = 'Skipped', reason = 'AlertResolved', ended_at = ?,
    message = 'Every alert that asked for it resolved before it began.'
WHERE fix = ? AND target = ? AND phase IN ('Pending', 'Admitted') AND origin = 'alert'
AND EXISTS (SELECT 1 FROM alerts WHERE remediation = seq)
AND NOT EXISTS (SELECT 1 FROM alerts WHERE remediation = seq AND resolved = 0)
RETURNING id, fix
"""


def active(connection: sqlite3.Connection) -> int:
    """How many remediations have not ended."""
    found = connection.execute(f"SELECT count(*) FROM remediations WHERE {ACTIVE}").fetchone()
    return int(found[0])


class Known:
    """Firing alerts that the store holds already, as alerts of a remediation that is active.

    Alertmanager repeats whole groups: most of what comes needs no write. This is true only for one
    connection as long as nobody else writes, so `fit` is asked at the beginning of each
    transaction; whoever ends a remediation says so by `forget`.
    """

    def __init__(self) -> None:
        self._alerts: dict[tuple[str, str], dict[str, float]] = {}
        self._count = 0
        self._valid_for: tuple[sqlite3.Connection | None, int] = (None, 0)

    def fit(self, connection: sqlite3.Connection) -> None:
        """Forget all where the connection is new (after any error) or another process wrote."""
        version = connection.execute("PRAGMA data_version").fetchone()[0]
        # Compared by identity: a connection that failed is closed and never comes back.
        known, known_version = self._valid_for
        if known is not connection or known_version != version or self._count > _MOST_KNOWN:
            self._alerts, self._count = {}, 0
        self._valid_for = (connection, version)

    def has(self, request: Request) -> bool:
        alerts = self._alerts.get((request.fix, _spelt(request.target)[0]))
        if alerts is None:
            return False
        return alerts.get(request.fingerprint, -1.0) >= request.starts_at.timestamp()

    def add(self, request: Request) -> None:
        alerts = self._alerts.setdefault((request.fix, _spelt(request.target)[0]), {})
        started = request.starts_at.timestamp()
        if alerts.get(request.fingerprint, -1.0) < started:
            alerts[request.fingerprint] = started
            self._count += 1

    def forget(self, fix: str, target: str) -> None:
        """A remediation of this fix and target key ended, or one of its alerts resolved."""
        self._alerts.pop((fix, target), None)


def accept(
    connection: sqlite3.Connection, messages: Sequence[Message], now: float, known: Known
) -> dict[str, Accepted]:
    """Write the requests of all messages in their order; by webhook request, what became of them.

    now: seconds since 1970.
    """
    known.fit(connection)
    flat = [
        (request_id, f"{request_id}-{number}", request)
        for request_id, requests in messages
        for number, request in enumerate(requests)
    ]
    created: dict[str, int] = {}
    cancelled: dict[str, list[tuple[str, str]]] = {}
    for firing, run in groupby(flat, key=lambda item: item[2].firing):
        part = [item for item in run if not (firing and known.has(item[2]))]
        if not firing:
            _resolved(connection, part, now, cancelled)
            for _, _, request in part:
                known.forget(request.fix, request.target.key)
        elif part:
            for remediation_id in _firing(connection, part, now):
                request_id = remediation_id.rpartition("-")[0]
                created[request_id] = created.get(request_id, 0) + 1
            for _, _, request in part:
                known.add(request)
    return {
        request_id: Accepted(
            created=created.get(request_id, 0),
            coalesced=sum(r.firing for r in requests) - created.get(request_id, 0),
            resolved=sum(not r.firing for r in requests),
            cancelled=tuple(cancelled.get(request_id, ())),
        )
        for request_id, requests in messages
    }


def _firing(
    connection: sqlite3.Connection, part: Sequence[tuple[str, str, Request]], now: float
) -> list[str]:
    batch = msgspec.json.encode(
        [
            (
                *(remediation_id, request.fix, *_spelt(request.target)),
                *(request.fingerprint, request.alert, request.starts_at.timestamp()),
            )
            for _, remediation_id, request in part
        ]
    ).decode()
    created = [row[0] for row in connection.execute(_INSERT, (batch, now, now))]
    connection.execute(_JOIN, (batch,))
    return created


@lru_cache(maxsize=8192)
def _spelt(target: Target) -> tuple[str, str]:
    """Its key and its JSON."""
    return target.key, msgspec.json.encode(target).decode()


def _resolved(
    connection: sqlite3.Connection,
    part: Sequence[tuple[str, str, Request]],
    now: float,
    cancelled: dict[str, list[tuple[str, str]]],
) -> None:
    targets: dict[tuple[str, str], str] = {}
    for request_id, _, request in part:
        where = (request.fix, request.target.key)
        values = (request.fingerprint, request.starts_at.timestamp(), *where)
        connection.execute(_RESOLVE, values)
        targets[where] = request_id
    for where, request_id in targets.items():
        for row in connection.execute(_CANCEL, (now, *where)).fetchall():
            cancelled.setdefault(request_id, []).append((row[0], row[1]))
