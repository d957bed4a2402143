"""What is asked of the SQLite journal: queries as functions of a connection that only reads."""

# ruff: noqa: S608 - what is put into SQL text are constants of these modules, never values

import json
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from remediator.journal import LONGEST_WAIT, Act, Counts, JournalError, Pause, rows
from remediator.journal.schema import ACTIVE, APPLICATION_ID, VERSION
from remediator.journal.writer import sentence
from remediator.model import Phase, Remediation, Request

T = TypeVar("T")


class Reader:
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
            owner = self._connection.execute("PRAGMA application_id").fetchone()[0]
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if (owner, version) not in ((APPLICATION_ID, VERSION), (0, 0)):  # (0, 0): not made yet
                self._close()
                raise JournalError(f"{self._path} is not a journal of this version of Upkeep")
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def get(connection: sqlite3.Connection, remediation_id: str) -> Remediation | None:
    """One with its steps and alerts, by its id or an unambiguous beginning of it."""
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


def find(
    connection: sqlite3.Connection, *, fix: str, phase: Phase | None, target: str, limit: int
) -> list[Remediation]:
    """See `Journal.find`."""
    conditions, values = ["1"], []
    for sql, value in (
        ("fix = ?", fix),
        ("phase = ?", phase.value if phase else ""),
        ("instr(target, ?)", target),
    ):
        if value:
            conditions.append(sql)
            values.append(value)
    found = connection.execute(
        f"SELECT {rows.LIST_COLUMNS} FROM remediations WHERE {' AND '.join(conditions)} "
        "ORDER BY seq DESC LIMIT ?",
        (*values, limit),
    )
    return [rows.remediation(row) for row in found]


def due(connection: sqlite3.Connection, fix: str, limit: int, now: float) -> list[Remediation]:
    """See `Journal.due`. now: seconds since 1970."""
    found = connection.execute(
        f"SELECT {rows.COLUMNS} FROM remediations WHERE fix = ? AND {ACTIVE} "
        "AND (due_at IS NULL OR due_at <= ? OR due_at > ? "
        "OR (expires_at <= ? AND approved_by = '')) "
        "ORDER BY phase = 'Running' DESC, phase = 'Admitted' DESC, due_at IS NOT NULL, seq LIMIT ?",
        (fix, now, now + LONGEST_WAIT, now, limit),
    ).fetchall()
    return [rows.remediation(row, rows.steps_of(connection, row["id"])) for row in found]


def acts(connection: sqlite3.Connection, fix: str, since: Mapping[str, str | float]) -> list[Act]:
    """Newest first: what is admitted, runs, or acted since (see `rows.since`)."""
    resumed = connection.execute("SELECT seq FROM resumed WHERE fix = ?", (fix,)).fetchone()
    found = connection.execute(
        " UNION ALL ".join(
            f"SELECT {rows.ACT_COLUMNS} FROM remediations WHERE fix = :fix AND {which}"
            for which in (
                "phase IN ('Admitted', 'Running') AND admitted_json IS NOT NULL",
                f"{rows.ACTED} AND {rows.THIS_BOOT}",
                f"{rows.ACTED} AND {rows.EARLIER_BOOT}",
            )
        )
        + " ORDER BY seq DESC LIMIT 10000",
        {"fix": fix, **since},
    )
    return [rows.act(row, resumed["seq"] if resumed else 0) for row in found]


def beginnings(connection: sqlite3.Connection, requests: Sequence[Request]) -> int:
    """How many new remediations the requests would make."""
    targets = {(request.fix, request.target.key) for request in requests if request.firing}
    found = connection.execute(
        "SELECT count(*) FROM json_each(?) AS wanted WHERE NOT EXISTS (SELECT 1 FROM remediations "
        f"WHERE fix = wanted.value ->> 0 AND target = wanted.value ->> 1 AND {ACTIVE})",
        (json.dumps(sorted(targets)),),
    ).fetchone()
    return int(found[0])


def size(connection: sqlite3.Connection) -> int:
    """Bytes in use; pages that were freed are used again."""
    found = connection.execute(
        "SELECT (page_count - freelist_count) * page_size "
        "FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
    ).fetchone()
    return int(found[0])


def pauses(connection: sqlite3.Connection) -> list[Pause]:
    """What is paused, by fix."""
    found = connection.execute("SELECT fix, since, by, why, reason FROM pauses ORDER BY fix")
    return [rows.pause(row) for row in found]


def counts(connection: sqlite3.Connection) -> Counts:
    """What the metrics show."""
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
            (row[0], Phase(row[1])): at for row in last if (at := rows.moment(row[2])) is not None
        },
        pauses=pauses(connection),
    )
