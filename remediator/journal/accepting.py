"""Requests of webhook messages into the SQLite journal: one statement for a whole batch of them.

What a message needs of Python is done by its caller (`Message`), before it waits for the journal's
thread: two threads that both want the interpreter stand in each other's way. What is left for the
thread is one JSON value for all messages, which SQLite works through outside Python's lock.
"""

# ruff: noqa: S608 - what is put into SQL text are constants of these modules, never values

import sqlite3
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby

import msgspec

from remediator.journal import Accepted
from remediator.journal.schema import ACTIVE
from remediator.model import Request, Target

_MOST_KNOWN = 200_000  # alerts held in memory

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
# Begun by INSERT, not WITH: Python counts rows only of what begins so.
_JOIN = f"""
INSERT INTO alerts (remediation, fingerprint, name, starts_at, resolved)
{_BATCH}
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


_encoder = msgspec.json.Encoder()


def active(connection: sqlite3.Connection) -> int:
    """How many remediations have not ended."""
    found = connection.execute(f"SELECT count(*) FROM remediations WHERE {ACTIVE}").fetchone()
    return int(found[0])


class Known:
    """Firing alerts that the store holds already, as alerts of a remediation that is active.

    Alertmanager repeats whole groups: most of what comes needs no write. What was `had` is true
    only as long as nothing is forgotten, which `generation` counts: the journal's thread compares
    it inside the transaction, after `fit`, and goes through the whole message where it differs.
    """

    def __init__(self) -> None:
        self._held: set[Request] = set()
        self._latest: dict[tuple[str, Target], dict[str, Request]] = {}
        self._valid_for: tuple[sqlite3.Connection | None, int] = (None, 0)
        self.generation = 0
        """Grows once something has been forgotten: who reads the new one finds it gone."""

    def fit(self, connection: sqlite3.Connection) -> None:
        """Forget all where the connection is new (after any error) or another process wrote."""
        version = connection.execute("PRAGMA data_version").fetchone()[0]
        # Compared by identity: a connection that failed is closed and never comes back.
        known, known_version = self._valid_for
        if known is not connection or known_version != version or len(self._held) > _MOST_KNOWN:
            self._held, self._latest = set(), {}
            self.generation += 1
        self._valid_for = (connection, version)

    def has(self, request: Request) -> bool:
        """May be asked by any thread."""
        return request in self._held

    def active(self, request: Request) -> bool:
        """Whether its target surely has an active remediation. May be asked by any thread."""
        return (request.fix, request.target) in self._latest

    def add(self, request: Request) -> None:
        alerts = self._latest.setdefault((request.fix, request.target), {})
        before = alerts.get(request.fingerprint)
        if before is not None:
            if before.starts_at >= request.starts_at:
                return
            self._held.discard(before)
        alerts[request.fingerprint] = request
        self._held.add(request)

    def forget(self, fix: str, target: Target) -> None:
        """A remediation of this fix and target ended, or one of its alerts resolved."""
        for request in self._latest.pop((fix, target), {}).values():
            self._held.discard(request)
        self.generation += 1


class Message:
    """What one webhook message asks for, made ready for the journal's thread."""

    __slots__ = ("beginnings", "firing", "generation", "id", "news", "requests", "rows")

    def __init__(self, request_id: str, requests: Sequence[Request], known: Known) -> None:
        self.id = request_id
        self.requests = requests
        self.generation = known.generation  # read before anything is asked of `known`
        self.firing = sum([request.firing for request in requests])
        fresh = [item for item in enumerate(requests) if not known.has(item[1])]
        self.news = [request for _, request in fresh]
        self.rows = _rows(request_id, fresh)
        # A new alert of a target at which something is under way begins nothing.
        self.beginnings = _rows(request_id, [item for item in fresh if not known.active(item[1])])


def _rows(request_id: str, numbered: Iterable[tuple[int, Request]]) -> bytes:
    """Rows of the batch's JSON, without its brackets."""
    return _encoder.encode(
        [
            (
                *(f"{request_id}-{number}", request.fix, *_spelt(request.target)),
                *(request.fingerprint, request.alert, request.starts_at.timestamp()),
            )
            for number, request in numbered
        ]
    )[1:-1]


def _batch(rows: Sequence[bytes]) -> str:
    return (b"[" + b",".join(rows) + b"]").decode()


@lru_cache(maxsize=8192)
def _spelt(target: Target) -> tuple[str, str]:
    """Its key and its JSON."""
    return target.key, msgspec.json.encode(target).decode()


def join(
    connection: sqlite3.Connection, messages: Sequence[Message], known: Known
) -> list[Accepted] | None:
    """All messages by one statement, which commits itself; None where `accept` must see to them.

    For the most that comes: alerts of targets at which something is under way. Where one of them
    isn't joined, because another process ended its remediation just now, `accept` goes through all
    again; what was joined stays so.
    """
    known.fit(connection)
    for message in messages:
        if (
            message.generation != known.generation
            or message.beginnings
            or message.firing < len(message.requests)
        ):
            return None
    rows = [message.rows for message in messages if message.rows]
    if rows:
        news = [request for message in messages for request in message.news]
        if connection.execute(_JOIN, (_batch(rows),)).rowcount != len(news):
            return None
        for request in news:
            known.add(request)
    return [
        Accepted(created=0, coalesced=message.firing, resolved=0, cancelled=())
        for message in messages
    ]


def accept(
    connection: sqlite3.Connection, messages: Sequence[Message], now: float, known: Known
) -> list[Accepted]:
    """Write the requests of all messages in their order; what became of each.

    now: seconds since 1970.
    """
    known.fit(connection)
    work = _Work(connection, now, known)
    for message in messages:
        if message.firing < len(message.requests):
            for firing, run in groupby(
                enumerate(message.requests), key=lambda item: item[1].firing
            ):
                part = list(run)
                if firing:
                    rows = _rows(message.id, part)
                    work.fire(rows, rows, [request for _, request in part])
                else:
                    work.resolve(message.id, [request for _, request in part])
        elif message.generation == known.generation:
            work.fire(message.beginnings, message.rows, message.news)
        else:
            rows = _rows(message.id, enumerate(message.requests))
            work.fire(rows, rows, message.requests)
    work.flush()
    return [work.outcome(message) for message in messages]


class _Work:
    """One transaction: firing alerts are gathered, then written at once."""

    def __init__(self, connection: sqlite3.Connection, now: float, known: Known) -> None:
        self._connection = connection
        self._now = now
        self._known = known
        self._beginnings: list[bytes] = []
        self._rows: list[bytes] = []
        self._fired: list[Request] = []
        self._created: dict[str, int] = {}
        self._cancelled: dict[str, list[tuple[str, str]]] = {}

    def fire(self, beginnings: bytes, rows: bytes, requests: Sequence[Request]) -> None:
        """beginnings: those of `rows` that may need a remediation of their own."""
        if beginnings:
            self._beginnings.append(beginnings)
        if rows:
            self._rows.append(rows)
            self._fired += requests

    def flush(self) -> None:
        if not self._rows:
            return
        if self._beginnings:
            values = (_batch(self._beginnings), self._now, self._now)
            for row in self._connection.execute(_INSERT, values).fetchall():
                request_id = row[0].rpartition("-")[0]
                self._created[request_id] = self._created.get(request_id, 0) + 1
        self._connection.execute(_JOIN, (_batch(self._rows),))
        for request in self._fired:
            self._known.add(request)
        self._beginnings, self._rows, self._fired = [], [], []

    def resolve(self, request_id: str, requests: Sequence[Request]) -> None:
        self.flush()
        targets: dict[tuple[str, str], None] = {}
        for request in requests:
            where = (request.fix, request.target.key)
            values = (request.fingerprint, request.starts_at.timestamp(), *where)
            self._connection.execute(_RESOLVE, values)
            targets[where] = None
            self._known.forget(request.fix, request.target)
        for where in targets:
            for row in self._connection.execute(_CANCEL, (self._now, *where)).fetchall():
                self._cancelled.setdefault(request_id, []).append((row[0], row[1]))

    def outcome(self, message: Message) -> Accepted:
        created = self._created.get(message.id, 0)
        return Accepted(
            created=created,
            coalesced=message.firing - created,
            resolved=len(message.requests) - message.firing,
            cancelled=tuple(self._cancelled.get(message.id, ())),
        )
