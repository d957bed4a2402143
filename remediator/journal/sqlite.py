"""The journal as one SQLite file: WAL, synchronous=FULL, one writing thread, readers beside it.

The command line opens the same file beside the running daemon: SQLite's own locks keep them apart.
"""

# ruff: noqa: S608 - what is put into SQL text are constants of these modules, never values

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from remediator.host import Clock
from remediator.journal import (
    LONGEST_WAIT,
    Accepted,
    Act,
    ConflictError,
    Counts,
    Instant,
    JournalError,
    Pause,
    accepting,
    rows,
)
from remediator.journal.accepting import Message
from remediator.journal.schema import ACTIVE
from remediator.journal.writer import Work, Writer, sentence
from remediator.model import (
    Claim,
    Condition,
    Decision,
    Origin,
    Phase,
    Remediation,
    Request,
    Step,
    Target,
)

T = TypeVar("T")


class SqliteJournal:
    """See `remediator.journal.Journal`."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        max_bytes: int | None = None,
        max_active: int = 20_000,
        busy_timeout: float = 2.0,
        read_only: bool = False,
    ) -> None:
        """`max_bytes`: what webhooks may fill; None for people, whose word is always written."""
        self.path = path
        self._clock = clock
        self._writer = Writer(path, busy_timeout=busy_timeout, max_bytes=max_bytes)
        self._reader = _Reader(path, busy_timeout)
        self._read_only = read_only
        self._max_active = max_active
        self._known = accepting.Known()
        self._room = 0  # new ones that surely fit; counted anew when used up
        self._room_of = max_active

    def bound(self, *, max_bytes: int | None, max_active: int) -> None:
        """Other bounds from the next commit on."""
        self._max_active = max_active
        self._writer.bound(max_bytes)

    def _now(self) -> float:
        return self._clock.now().timestamp()

    def _instant(self) -> Instant:
        return Instant(
            wall=self._now(), boot_id=self._clock.boot_id, boottime=self._clock.boottime()
        )

    async def accept(self, requests: Sequence[Request], request_id: str) -> Accepted:
        message = Message(request_id, requests, self._known)
        return await self._writer.run_together(self._accept, message)

    def _accept(
        self, connection: sqlite3.Connection, messages: Sequence[Message]
    ) -> Sequence[Accepted | JournalError | ConflictError]:
        """Many messages in one go; those for which there's no room are refused whole."""
        wanted = sum([len(message.requests) for message in messages])
        if self._room < wanted or self._room_of != self._max_active:
            self._room_of = self._max_active
            self._room = self._room_of - accepting.active(connection)
        taken: list[Message] = []
        for message in messages:
            if len(message.requests) <= self._room:
                self._room -= len(message.requests)
                taken.append(message)
        accepted = accepting.accept(connection, taken, self._now(), self._known)
        for message, outcome in zip(taken, accepted, strict=True):
            self._room += len(message.requests) - outcome.created
        if len(taken) == len(messages):
            return accepted
        full = JournalError(f"{self._room_of} remediations wait already, as many as may")
        outcomes = dict(zip([message.id for message in taken], accepted, strict=True))
        return [outcomes.get(message.id, full) for message in messages]

    async def begin(
        self, fix: str, target: Target, remediation_id: str, by: str, claim: Claim
    ) -> Remediation:
        now, instant = self._now(), rows.encode(self._instant())

        def work(connection: sqlite3.Connection) -> Remediation:
            found = connection.execute(
                f"SELECT id, phase FROM remediations WHERE fix = ? AND target = ? AND {ACTIVE}",
                (fix, target.key),
            ).fetchone()
            if found is not None:
                raise ConflictError(
                    f"{fix} of {target} is {found['phase']} already as {found['id']}; wait for it"
                )
            connection.execute(
                "INSERT INTO remediations (id, fix, target, target_json, origin, phase, reason, "
                "message, created_at, last_seen_at, approved_by, admitted_json, claim_json) "
                "VALUES (?, ?, ?, ?, ?, 'Admitted', 'ByHand', ?, ?, ?, ?, ?, ?)",
                (
                    *(remediation_id, fix, target.key, rows.encode(target), Origin.HAND),
                    *(f"{by} asked for it on the command line.", now, now, by, instant),
                    rows.encode(claim),
                ),
            )
            return _one(connection, remediation_id)

        return await self._writer.run(work)

    async def get(self, remediation_id: str) -> Remediation | None:
        def read(connection: sqlite3.Connection) -> Remediation | None:
            escaped = remediation_id.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            found = connection.execute(
                f"SELECT {rows.COLUMNS} FROM remediations WHERE id = ? OR id LIKE ? ESCAPE '\\' "
                "ORDER BY id = ? DESC LIMIT 2",
                (remediation_id, f"{escaped}%", remediation_id),
            ).fetchall()
            if not found or (len(found) > 1 and found[0]["id"] != remediation_id):
                return None
            row = found[0]
            steps = rows.steps_of(connection, row["id"])
            return rows.remediation(row, steps, rows.alerts_of(connection, row["seq"]))

        return await self._read(read)

    async def find(
        self, *, fix: str = "", phase: Phase | None = None, target: str = "", limit: int = 100
    ) -> list[Remediation]:
        conditions, values = ["1"], []
        for sql, value in (
            ("fix = ?", fix),
            ("phase = ?", phase.value if phase else ""),
            ("instr(target, ?)", target),
        ):
            if value:
                conditions.append(sql)
                values.append(value)

        def read(connection: sqlite3.Connection) -> list[Remediation]:
            found = connection.execute(
                f"SELECT {rows.LIST_COLUMNS} FROM remediations WHERE {' AND '.join(conditions)} "
                "ORDER BY seq DESC LIMIT ?",
                (*values, limit),
            )
            return [rows.remediation(row) for row in found]

        return await self._read(read)

    async def due(self, fix: str, limit: int) -> list[Remediation]:
        now = self._now()

        def read(connection: sqlite3.Connection) -> list[Remediation]:
            found = connection.execute(
                f"SELECT {rows.COLUMNS} FROM remediations WHERE fix = ? AND {ACTIVE} "
                "AND (due_at IS NULL OR due_at <= ? OR due_at > ? OR expires_at <= ?) "
                "ORDER BY phase = 'Running' DESC, phase = 'Admitted' DESC, seq LIMIT ?",
                (fix, now, now + LONGEST_WAIT, now, limit),
            ).fetchall()
            return [rows.remediation(row, rows.steps_of(connection, row["id"])) for row in found]

        return await self._read(read)

    async def acts(self, fix: str, horizon: float) -> list[Act]:
        # Twice the horizon on the wall clock: which of them count is decided on the boot clock.
        since = self._now() - 2 * horizon - 7200

        def read(connection: sqlite3.Connection) -> list[Act]:
            resumed = connection.execute("SELECT seq FROM resumed WHERE fix = ?", (fix,)).fetchone()
            found = connection.execute(
                f"SELECT {rows.ACT_COLUMNS} FROM remediations WHERE fix = ? AND "
                "((phase IN ('Admitted', 'Running') AND admitted_json IS NOT NULL) OR "
                "(phase IN ('Succeeded', 'Failed') AND ended_at >= ? AND started_at IS NOT NULL)) "
                "ORDER BY seq DESC LIMIT 10000",
                (fix, since),
            )
            return [rows.act(row, resumed["seq"] if resumed else 0) for row in found]

        return await self._read(read)

    async def wait(
        self, remediation_id: str, decision: Decision, *, due_in: float, expires_in: float
    ) -> None:
        now = self._now()

        def work(connection: sqlite3.Connection) -> None:
            _change(
                connection,
                "phase = 'Pending', reason = ?, message = ?, due_at = ?, admitted_json = NULL, "
                "expires_at = coalesce(expires_at, ?)",
                (decision.reason, decision.message, now + due_in, now + expires_in),
                remediation_id,
                "phase IN ('Pending', 'Admitted')",
            )

        await self._writer.run(work)

    async def admit(self, remediation_id: str, decision: Decision) -> None:
        instant = rows.encode(self._instant())

        def work(connection: sqlite3.Connection) -> None:
            _change(
                connection,
                "phase = 'Admitted', reason = ?, message = ?, admitted_json = ?, due_at = NULL",
                (decision.reason, decision.message, instant),
                remediation_id,
                "phase = 'Pending'",
            )

        await self._writer.run(work)

    async def claim(
        self, remediation_id: str, claim: Claim, condition: Condition | None, previous: Claim | None
    ) -> Remediation:
        now = self._now()

        def work(connection: sqlite3.Connection) -> Remediation:
            text = rows.encode_condition(condition) if condition is not None else None
            where, values = "phase = 'Admitted'", ()
            if previous is not None:
                where = "phase = 'Running' AND claim_json = ?"
                values = (rows.encode(previous),)  # type: ignore[assignment]
            _change(
                connection,
                "phase = 'Running', claim_json = ?, workload = coalesce(?, workload), "
                "condition_json = coalesce(?, condition_json), reason = 'Running', "
                "started_at = coalesce(started_at, ?), message = ''",
                (rows.encode(claim), condition.workload if condition else None, text, now),
                remediation_id,
                where,
                values,
            )
            return _one(connection, remediation_id)

        return await self._writer.run(work)

    async def record_step(self, remediation_id: str, claim: Claim, index: int, step: Step) -> None:
        step_json, claim_json = rows.encode(step), rows.encode(claim)

        def work(connection: sqlite3.Connection) -> None:
            done = connection.execute(
                "INSERT INTO steps (remediation, number, step_json) "
                "SELECT id, ?, ? FROM remediations "
                "WHERE id = ? AND phase = 'Running' AND claim_json = ? "
                "ON CONFLICT (remediation, number) DO UPDATE SET step_json = excluded.step_json",
                (index, step_json, remediation_id, claim_json),
            )
            if done.rowcount != 1:
                raise ConflictError(f"{remediation_id} is no longer this process's to execute")

        await self._writer.run(work)

    async def finish(
        self,
        remediation_id: str,
        phase: Phase,
        reason: str,
        message: str,
        *,
        pause: Pause | None = None,
    ) -> Remediation:
        now, instant = self._now(), rows.encode(self._instant())

        def end(connection: sqlite3.Connection) -> Remediation:
            if phase is Phase.SKIPPED:
                merged = _merge_refusal(connection, remediation_id, reason, message, now)
                if merged is not None:
                    self._known.forget(merged.fix, merged.target)
                    return merged
            _change(
                connection,
                "phase = ?, reason = ?, message = ?, ended_at = ?, ended_json = ?, due_at = NULL",
                (phase.value, reason, message, now, instant),
                remediation_id,
                ACTIVE,
            )
            ended = _one(connection, remediation_id)
            self._known.forget(ended.fix, ended.target)
            return ended

        def work(connection: sqlite3.Connection) -> Remediation:
            ended = end(connection)
            if pause is not None:
                since = pause.since.timestamp()
                _pause(connection, pause.fix, since, pause.by, pause.why, pause.reason)
            return ended

        return await self._writer.run(work)

    async def approve(self, remediation_id: str, by: str) -> Remediation:
        def work(connection: sqlite3.Connection) -> Remediation:
            _change(
                connection,
                "approved_by = ?, due_at = NULL",
                (by,),
                remediation_id,
                "phase = 'Pending' AND approved_by = ''",
            )
            return _one(connection, remediation_id)

        return await self._writer.run(work)

    async def pause(self, fix: str, by: str, why: str, reason: str = "Paused") -> bool:
        now = self._now()

        def work(connection: sqlite3.Connection) -> bool:
            return _pause(connection, fix, now, by, why, reason)

        return await self._writer.run(work)

    async def resume(self, fix: str, by: str) -> bool:
        now = self._now()

        def work(connection: sqlite3.Connection) -> bool:
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

        return await self._writer.run(work)

    async def pauses(self) -> list[Pause]:
        def read(connection: sqlite3.Connection) -> list[Pause]:
            found = connection.execute(
                "SELECT fix, since, by, why, reason FROM pauses ORDER BY fix"
            )
            return [rows.pause(row) for row in found]

        return await self._read(read)

    async def counts(self) -> Counts:
        pauses = await self.pauses()

        def read(connection: sqlite3.Connection) -> Counts:
            active = connection.execute(
                f"SELECT fix, phase, count(*) FROM remediations WHERE {ACTIVE} GROUP BY fix, phase"
            ).fetchall()
            last = connection.execute(
                "SELECT fix, phase, max(ended_at) FROM remediations "
                "WHERE phase IN ('Succeeded', 'Failed', 'Skipped') GROUP BY fix, phase"
            ).fetchall()
            return Counts(
                active={(row[0], Phase(row[1])): row[2] for row in active},
                last={
                    (row[0], Phase(row[1])): at
                    for row in last
                    if (at := rows.moment(row[2])) is not None
                },
                pauses=pauses,
            )

        return await self._read(read)

    async def prune(self, *, max_age: float, max_records: int) -> int:
        before = self._now() - max_age

        def work(connection: sqlite3.Connection) -> int:
            done = connection.execute(
                "DELETE FROM remediations WHERE seq IN (SELECT seq FROM remediations "
                "WHERE ended_at < ? AND last_seen_at < ? LIMIT 500)",
                (before, before),
            ).rowcount
            ended = connection.execute(
                "SELECT count(*) FROM remediations WHERE ended_at IS NOT NULL"
            ).fetchone()[0]
            # Refusals go first: what acted is what cooldowns and storm limits are counted from.
            done += connection.execute(
                "DELETE FROM remediations WHERE seq IN (SELECT seq FROM remediations "
                "WHERE ended_at IS NOT NULL ORDER BY phase <> 'Skipped', seq LIMIT ?)",
                (min(500, max(0, ended - max_records)),),
            ).rowcount
            return done

        total = 0
        while done := await self._writer.run(work):
            total += done
        return total

    async def aclose(self) -> None:
        await self._writer.aclose()
        self._reader.close()

    async def _read(self, read: Work[T]) -> T:
        if not self._read_only and not self.path.exists():
            await self._writer.run(lambda _connection: None)  # makes it
        try:
            return await asyncio.to_thread(self._reader.run, read)
        except RuntimeError as error:  # no thread can be had
            raise JournalError(f"the journal {self.path} can't be read: {error}") from None


class _Reader:
    """A read-only connection of its own, so that a long list doesn't hold up the webhooks."""

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self._path = path
        self._busy_timeout = busy_timeout
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    def run(self, read: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                return read(self._open())
            except (sqlite3.Error, OSError) as error:
                self._close()
                raise JournalError(sentence(self._path, error)) from None

    def close(self) -> None:
        with self._lock:
            self._close()

    def _open(self) -> sqlite3.Connection:
        found = self._path.stat()
        inode = (found.st_dev, found.st_ino)
        if self._connection is None or inode != self._inode:
            self._close()
            self._connection = sqlite3.connect(
                f"file:{self._path.as_posix().replace('?', '%3f').replace('#', '%23')}?mode=ro",
                uri=True,
                timeout=self._busy_timeout,
                isolation_level=None,
                check_same_thread=False,
            )
            self._connection.row_factory = sqlite3.Row
            self._inode = inode
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _merge_refusal(
    connection: sqlite3.Connection, remediation_id: str, reason: str, message: str, now: float
) -> Remediation | None:
    """Fold a repeated refusal into the record of the last one; None where there is none."""
    mine = _one(connection, remediation_id)
    if mine.phase.terminal or mine.started_at is not None:
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
        "UPDATE remediations SET count = count + ?, last_seen_at = ?, message = ? WHERE id = ?",
        (mine.count, now, message, earlier["id"]),
    )
    return _one(connection, earlier["id"])


def _one(connection: sqlite3.Connection, remediation_id: str) -> Remediation:
    row = connection.execute(
        f"SELECT {rows.COLUMNS} FROM remediations WHERE id = ?",
        (remediation_id,),
    ).fetchone()
    if row is None:
        raise ConflictError(f"there is no remediation {remediation_id}")
    return rows.remediation(row, rows.steps_of(connection, remediation_id))


def _pause(  # noqa: PLR0917 - in the order of the columns
    connection: sqlite3.Connection, fix: str, since: float, by: str, why: str, reason: str
) -> bool:
    """False where it is paused already, which stays as it is."""
    done = connection.execute(
        "INSERT INTO pauses (fix, since, by, why, reason) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (fix) DO NOTHING",
        (fix, since, by, why, reason),
    )
    return done.rowcount == 1


def _change(  # noqa: PLR0917 - in the order of the statement it makes
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
        found = _one(connection, remediation_id)
        approved = f", approved by {found.approved_by}" if found.approved_by else ""
        raise ConflictError(f"{remediation_id} is {found.phase} ({found.reason}){approved}")
