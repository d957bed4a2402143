"""The journal as one SQLite file: WAL, synchronous=FULL, one writing thread, readers beside it.

The command line opens the same file beside the running daemon: SQLite's own locks keep them apart.
"""

# ruff: noqa: S608 - what is put into SQL text are constants of these modules, never values

import asyncio
import contextlib
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from remediator.host import Clock
from remediator.journal import (
    Accepted,
    Act,
    ConflictError,
    Counts,
    Instant,
    JournalError,
    Pause,
    accepting,
    changing,
    reading,
    rows,
)
from remediator.journal.accepting import Message
from remediator.journal.reading import Reader
from remediator.journal.schema import ACTIVE
from remediator.journal.writer import Work, Writer
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

SMALLEST = 256 << 10  # bytes, a few times what a journal with nothing in it has
RESERVE = 8 << 20
"""Bytes beyond `max_bytes` that webhooks may not fill: what runs must not break off for them."""


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
        self._opened = self._instant()
        self._max_bytes = max_bytes
        self._writer = Writer(path, busy_timeout=busy_timeout, max_bytes=_with_reserve(max_bytes))
        self._reader = Reader(path, busy_timeout)
        # Apart from the threads of the fixes: neither may take all of them while its disk hangs.
        self._reading = ThreadPoolExecutor(1, "journal-reads")
        self._read_only = read_only
        self._max_active = max_active
        self._known = accepting.Known()
        self._room = 0  # new ones that surely fit; counted anew when used up
        self._room_of = max_active
        self._unmeasured = RESERVE  # bytes joined since the size was looked at

    def bound(self, *, max_bytes: int | None, max_active: int) -> None:
        """Other bounds from the next commit on."""
        self._max_active = max_active
        self._max_bytes = max_bytes
        self._writer.bound(_with_reserve(max_bytes))

    def _now(self) -> float:
        return self._clock.now().timestamp()

    def _instant(self) -> Instant:
        return Instant(
            wall=self._now(), boot_id=self._clock.boot_id, boottime=self._clock.boottime()
        )

    async def accept(self, requests: Sequence[Request], request_id: str) -> Accepted:
        message = Message(request_id, requests, self._known)
        return await self._writer.run_together(self._accept, message, self._join)

    def _join(
        self, connection: sqlite3.Connection, messages: Sequence[Message]
    ) -> list[Accepted] | None:
        more = sum([len(message.rows) for message in messages])
        if self._max_bytes is not None and more:
            # Its size is measured once for so much as surely fits into the reserve.
            self._unmeasured += more
            if more > RESERVE // 8:
                return None
            if self._unmeasured > RESERVE // 8:
                if self._filled(connection, 0):
                    return None
                self._unmeasured = more
        return accepting.join(connection, messages, self._known)

    def _accept(
        self, connection: sqlite3.Connection, messages: Sequence[Message]
    ) -> Sequence[Accepted | JournalError | ConflictError]:
        """Many messages in one go; those for which there's no room are refused whole."""
        if self._filled(connection, 0):
            return [self._full()] * len(messages)
        wanted = sum([len(message.requests) for message in messages])
        if self._room < wanted or self._room_of != self._max_active:
            self._room_of = self._max_active
            self._room = self._room_of - accepting.active(connection)
        left = max(0, self._room)
        taken: list[Message] = []
        for message in messages:
            needed = len(message.requests)
            if needed > left:  # what joins an active one or has resolved needs no room
                needed = reading.beginnings(connection, message.requests)
            if needed <= left:
                left -= needed
                taken.append(message)
        large = sum([len(message.rows) for message in taken]) > RESERVE // 8
        if large:
            connection.execute("SAVEPOINT large")
        accepted = accepting.accept(connection, taken, self._now(), self._known)
        if large and self._filled(connection, RESERVE // 2):  # too much at once: none is kept
            connection.execute("ROLLBACK TO large")
            for request in [request for message in taken for request in message.requests]:
                self._known.forget(request.fix, request.target)
            return [self._full()] * len(messages)
        self._room -= sum([outcome.created for outcome in accepted])
        if len(taken) == len(messages):
            return accepted
        full = JournalError(f"{self._room_of} remediations wait already, as many as may")
        outcomes = dict(zip([message.id for message in taken], accepted, strict=True))
        return [outcomes.get(message.id, full) for message in messages]

    def _filled(self, connection: sqlite3.Connection, beyond: int) -> bool:
        """Whether the journal has grown as large as webhooks may make it, and `beyond` bytes."""
        most = self._max_bytes
        return most is not None and reading.size(connection) > max(SMALLEST, most) + beyond

    def _full(self) -> JournalError:
        return JournalError(
            f"the journal {self.path} is full: it has as many bytes as webhooks may fill; wait for "
            "old remediations to be dropped, or raise journal.max_bytes"
        )

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
        now, instant = self._now(), rows.encode(self._instant())

        def work(connection: sqlite3.Connection) -> Remediation:
            found = connection.execute(
                f"SELECT id, phase FROM remediations WHERE fix = ? AND target = ? AND {ACTIVE}",
                (fix, target.key),
            ).fetchone()
            if found is not None and instead and found["phase"] == Phase.PENDING:
                changing.give_way(connection, found["id"], f"{by} asked for it by hand", now)
                self._known.forget(fix, target)
            elif found is not None:
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
            return changing.one(connection, remediation_id)

        return await self._writer.run(work)

    async def get(self, remediation_id: str) -> Remediation | None:
        return await self._read(lambda connection: reading.get(connection, remediation_id))

    async def find(
        self, *, fix: str = "", phase: Phase | None = None, target: str = "", limit: int = 100
    ) -> list[Remediation]:
        return await self._read(
            lambda connection: reading.find(
                connection, fix=fix, phase=phase, target=target, limit=limit
            )
        )

    async def due(self, fix: str, limit: int) -> list[Remediation]:
        now = self._now()
        return await self._read(lambda connection: reading.due(connection, fix, limit, now))

    async def acts(self, fix: str, horizon: float) -> list[Act]:
        since = rows.since(self._instant(), horizon)
        return await self._read(lambda connection: reading.acts(connection, fix, since))

    async def wait(
        self, remediation_id: str, decision: Decision, *, due_in: float, expires_in: float
    ) -> None:
        now = self._now()

        def work(connection: sqlite3.Connection) -> None:
            changing.change(
                connection,
                "phase = 'Pending', reason = ?, message = ?, due_at = ?, admitted_json = NULL, "
                "expires_at = coalesce(expires_at, ?)",
                (decision.reason, rows.text(decision.message), now + due_in, now + expires_in),
                remediation_id,
                "phase IN ('Pending', 'Admitted')",
            )

        await self._writer.run(work)

    async def admit(self, remediation_id: str, decision: Decision, workload: str = "") -> None:
        instant = rows.encode(self._instant())

        def work(connection: sqlite3.Connection) -> None:
            changing.change(
                connection,
                "phase = 'Admitted', reason = ?, message = ?, workload = ?, admitted_json = ?, "
                "due_at = NULL",
                (decision.reason, rows.text(decision.message), workload, instant),
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
            where, values = f"phase = 'Admitted' AND {changing.NOT_PAUSED}", ()
            if previous is not None:
                where = "phase = 'Running' AND claim_json = ?"
                values = (rows.encode(previous),)  # type: ignore[assignment]
            changing.change(
                connection,
                "phase = 'Running', claim_json = ?, workload = coalesce(?, workload), "
                "condition_json = coalesce(?, condition_json), reason = 'Running', "
                "started_at = coalesce(started_at, ?), message = ''",
                (rows.encode(claim), condition.workload if condition else None, text, now),
                remediation_id,
                where,
                values,
            )
            return changing.one(connection, remediation_id)

        return await self._writer.run(work)

    async def record_step(self, remediation_id: str, claim: Claim, index: int, step: Step) -> None:
        step_json, claim_json = rows.encode_step(step), rows.encode(claim)

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
        claim: Claim | None = None,
        pause: Pause | None = None,
    ) -> Remediation:
        now, instant = self._now(), rows.encode(self._instant())
        claim_json = None if claim is None else rows.encode(claim)
        message = rows.text(message)

        def end(connection: sqlite3.Connection) -> Remediation:
            if phase is Phase.SKIPPED:
                merged = changing.merge_refusal(
                    connection, remediation_id, claim, reason, message, now
                )
                if merged is not None:
                    self._known.forget(merged.fix, merged.target)
                    return merged
            changing.change(
                connection,
                "phase = ?, reason = ?, message = ?, ended_at = ?, ended_json = ?, due_at = NULL",
                (phase.value, reason, message, now, instant),
                remediation_id,
                f"{ACTIVE} AND claim_json IS ?",
                (claim_json,),
            )
            ended = changing.one(connection, remediation_id)
            self._known.forget(ended.fix, ended.target)
            return ended

        def work(connection: sqlite3.Connection) -> Remediation:
            ended = end(connection)
            if pause is not None:
                since = pause.since.timestamp()
                changing.pause(connection, pause.fix, since, pause.by, pause.why, pause.reason)
            return ended

        return await self._writer.run(work)

    async def approve(self, remediation_id: str, by: str) -> Remediation:
        now = self._now()

        def work(connection: sqlite3.Connection) -> Remediation:
            changing.change(
                connection,
                "approved_by = ?, due_at = NULL",
                (by,),
                remediation_id,
                "phase = 'Pending' AND approved_by = '' AND coalesce(expires_at > ?, true)",
                (now,),
            )
            return changing.one(connection, remediation_id)

        return await self._writer.run(work)

    async def pause(self, fix: str, by: str, why: str, reason: str = "Paused") -> bool:
        now = self._now()

        def work(connection: sqlite3.Connection) -> bool:
            return changing.pause(connection, fix, now, by, rows.text(why), reason)

        return await self._writer.run(work)

    async def resume(self, fix: str, by: str) -> bool:
        now = self._now()
        return await self._writer.run(lambda connection: changing.resume(connection, fix, by, now))

    async def pauses(self) -> list[Pause]:
        return await self._read(reading.pauses)

    async def counts(self) -> Counts:
        return await self._read(reading.counts)

    async def prune(self, *, max_age: float, max_records: int, horizon: float = 0.0) -> int:
        now, opened = self._instant(), self._opened
        # The wall clock as it would be had nobody set it ahead: history is not dropped for that.
        wall = min(now.wall, opened.wall + max(0.0, now.boottime - opened.boottime))
        before, since = wall - max_age, rows.since(now, horizon)
        total = 0
        while done := await self._writer.run(
            lambda connection: changing.prune(connection, before, max_records, since)
        ):
            total += done
        return total

    async def aclose(self) -> None:
        await self._writer.aclose()
        with contextlib.suppress(RuntimeError):  # no thread can be had, so none reads
            await asyncio.get_running_loop().run_in_executor(self._reading, self._reader.close)
        self._reading.shutdown(wait=False)

    async def _read(self, read: Work[T]) -> T:
        try:
            if not self._read_only and not self.path.exists():
                await self._writer.run(lambda _connection: None)  # makes it
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._reading, self._reader.run, read)
        except (RuntimeError, OSError) as error:  # no thread can be had, or no look at its folder
            raise JournalError(f"the journal {self.path} can't be read: {error}") from None


def _with_reserve(max_bytes: int | None) -> int | None:
    return None if max_bytes is None else max(SMALLEST, max_bytes) + RESERVE
