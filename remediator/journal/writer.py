"""One thread that owns the SQLite connection and commits many callers' work with one fsync.

Durable before the 200 costs an fsync; a fsync for each webhook would cap the rate at the disk's.
So whatever waits when a commit ends goes into the next transaction together (group commit), and
every caller is answered only after it. A transaction that fails is rolled back as a whole: nobody
in it is told that his work was kept.
"""

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from remediator.journal import ConflictError, JournalError
from remediator.journal.schema import APPLICATION_ID, STATEMENTS, VERSION

T = TypeVar("T")
Item = TypeVar("Item")
Work = Callable[[sqlite3.Connection], T]
Refusal = ConflictError | JournalError
Together = Callable[[sqlite3.Connection, Sequence[Item]], Sequence[T | Refusal]]
"""Work on many callers' items at once: each one's result or refusal, in their order."""
AtOnce = Callable[[sqlite3.Connection, Sequence[Item]], Sequence[T] | None]
"""The same by one statement without a transaction around it; None where that doesn't do."""

_BATCH = 128  # pieces of work in one transaction, roughly
_QUEUE = 2048  # pieces of work waiting; beyond it the caller is told to come again
_PAGE = 4096  # bytes


class _Entry(NamedTuple):
    work: Together[Any, Any]
    item: Any
    future: asyncio.Future[Any]
    at_once: AtOnce[Any, Any] | None


class Writer:
    """Runs functions of the connection, many in one durable transaction."""

    def __init__(
        self, path: Path, *, busy_timeout: float = 2.0, max_bytes: int | None = None
    ) -> None:
        self.path = path
        self._busy_timeout = busy_timeout
        self._max_pages = _pages(max_bytes)
        self._bounded_to = self._max_pages
        self._queue: queue.SimpleQueue[list[_Entry] | None] = queue.SimpleQueue()
        self._handing: list[_Entry] = []
        self._waiting = 0
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._checked = False

    def bound(self, max_bytes: int | None) -> None:
        """Another largest size, from the next transaction on."""
        self._max_pages = _pages(max_bytes)

    async def run(self, work: Work[T]) -> T:
        """Run `work` in a transaction; return when it is durable.

        `work` may raise `ConflictError` or `JournalError` before it has written anything: the
        others of its transaction are kept. `JournalError` too where it can't be committed.
        """

        def alone(connection: sqlite3.Connection, _items: Sequence[None]) -> list[T | Refusal]:
            try:
                return [work(connection)]
            except (ConflictError, JournalError) as error:
                return [error]

        return await self.run_together(alone, None)

    async def run_together(
        self, work: Together[Item, T], item: Item, at_once: AtOnce[Item, T] | None = None
    ) -> T:
        """As `run`, but callers that wait with the same `work` are served by one call of it.

        Each statement hands the interpreter's lock to and fro; one statement for a whole batch is
        what keeps a busy event loop and this thread out of each other's way. So where all that
        waits is of one `work`, its `at_once` is tried first, which needs no BEGIN and no COMMIT.
        """
        if self._waiting >= _QUEUE:
            raise JournalError(f"the journal {self.path} can't keep up; try again later")
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name="journal", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise JournalError(f"the journal {self.path} can't be used: {error}") from None
            self._thread = thread
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting += 1
        self._handing.append(_Entry(work, item, future, at_once))
        if len(self._handing) == 1:  # whatever else this turn of the loop brings goes along
            loop.call_soon(self._hand_over)
        return await future

    def _hand_over(self) -> None:
        if self._handing:
            self._queue.put(self._handing)
            self._handing = []

    async def aclose(self) -> None:
        """Finish what was handed in, then close."""
        self._hand_over()
        if self._thread is not None:
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def _serve(self) -> None:
        while (batch := self._queue.get()) is not None:
            last = False
            while len(batch) < _BATCH and not self._queue.empty():
                more = self._queue.get_nowait()  # nobody else takes from it
                if more is None:
                    last = True
                    break
                batch += more
            self._answer(batch, self._commit(batch))
            if last:
                break
        self._close()

    def _commit(self, batch: Sequence[_Entry]) -> Sequence[Any]:
        """Each entry's result, or the exception it is to be told."""
        groups: dict[Together[Any, Any], list[int]] = {}
        for place, entry in enumerate(batch):
            groups.setdefault(entry.work, []).append(place)
        results: list[Any] = [None] * len(batch)
        at_work: Sequence[int] = range(len(batch))
        try:
            connection = self._open()
            if len(groups) == 1 and (at_once := batch[0].at_once) is not None:
                given = at_once(connection, [entry.item for entry in batch])
                if given is not None:
                    return given
            connection.execute("BEGIN IMMEDIATE")
            for work, places in groups.items():
                at_work = places
                given = work(connection, [batch[place].item for place in places])
                for place, result in zip(places, given, strict=True):
                    results[place] = result
            connection.execute("COMMIT")
        except (sqlite3.Error, OSError, JournalError) as error:
            # Closed, not kept: the file may be mended or replaced before the next attempt.
            self._checked = self._checked and isinstance(error, sqlite3.OperationalError)
            self._close()
            return [JournalError(sentence(self.path, error)) for _ in batch]
        except Exception as error:  # noqa: BLE001 - told to the callers, with its traceback
            self._close()
            others = JournalError(f"the journal {self.path} could not keep it beside other work")
            return [error if place in at_work else others for place in range(len(batch))]
        return results

    def _answer(self, batch: Sequence[_Entry], results: Sequence[Any]) -> None:
        def resolve() -> None:
            self._waiting -= len(batch)
            for entry, result in zip(batch, results, strict=True):
                if entry.future.done():  # its caller was cancelled; the work is kept all the same
                    continue
                if isinstance(result, Exception):
                    entry.future.set_exception(result)
                else:
                    entry.future.set_result(result)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            batch[0].future.get_loop().call_soon_threadsafe(resolve)

    def _open(self) -> sqlite3.Connection:
        """The connection, held to the bound in force."""
        connection, wanted = self._opened(), self._max_pages
        if wanted != self._bounded_to:
            # SQLite's own bound, where none is wanted; never less than the file has.
            connection.execute(f"PRAGMA max_page_count={wanted or 0xFFFFFFFE}")
            self._bounded_to = wanted
        return connection

    def _opened(self) -> sqlite3.Connection:
        """The connection; opened anew where there is none or its file was moved away."""
        if self._connection is not None:
            try:
                found = self.path.stat()
            except FileNotFoundError:
                found = None
            if found is not None and (found.st_dev, found.st_ino) == self._inode:
                return self._connection
            # Going on would write to a file that no restart finds again.
            self._close()
        self._bounded_to = self._max_pages
        self._connection = open_journal(
            self.path, self._busy_timeout, self._bounded_to, check=not self._checked
        )
        self._checked = True
        found = self.path.stat()
        self._inode = (found.st_dev, found.st_ino)
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):  # a broken file may fail even here
                self._connection.close()
            self._connection = None


def _pages(max_bytes: int | None) -> int | None:
    return None if max_bytes is None else max(64, max_bytes // _PAGE)


def sentence(path: Path, error: Exception) -> str:
    """What is wrong with the journal and how to mend it."""
    if isinstance(error, JournalError):
        return str(error)
    text = str(error)
    remedy = "see whether its disk works"
    if "full" in text:
        remedy = "make room on its disk, or raise journal.max_bytes"
    elif "readonly" in text or "Read-only" in text:
        remedy = "make it and its directory writable"
    elif "locked" in text:
        remedy = "find who holds it open in a transaction (fuser)"
    elif "malformed" in text or "not a database" in text:
        remedy = "move it away, or put a copy in its place; a new one is made"
    elif "unable to open" in text or isinstance(error, OSError):
        remedy = "see that its directory exists and may be written"
    return f"the journal {path} can't be used: {text}; {remedy}"


def open_journal(
    path: Path, busy_timeout: float, max_pages: int | None, *, check: bool
) -> sqlite3.Connection:
    """Open or make the file: WAL, synchronous=FULL, owner-only, ours, of this version and sound."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Never opened where it exists: closing any descriptor of it drops every lock this process holds
    # on it, SQLite's own too, and the next process to close would take the WAL away under this one.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(
        path, timeout=busy_timeout, isolation_level=None, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        if max_pages is not None:
            connection.execute(f"PRAGMA max_page_count={max_pages}")
        connection.execute("PRAGMA journal_size_limit=16777216")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            _make(connection)
        _inspect(connection, path, quick_check=check)
    except BaseException:
        connection.close()
        raise
    return connection


def _make(connection: sqlite3.Connection) -> None:
    """Make the tables, unless another process was first."""
    connection.execute("BEGIN EXCLUSIVE")
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        for statement in STATEMENTS:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.execute("COMMIT")


def _inspect(connection: sqlite3.Connection, path: Path, *, quick_check: bool) -> None:
    """Raise where the file isn't a journal of this version, or isn't sound."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    owner = connection.execute("PRAGMA application_id").fetchone()[0]
    if owner != APPLICATION_ID or version != VERSION:
        raise JournalError(
            f"{path} is not a journal of this version of Upkeep; name another file by --journal"
        )
    if quick_check:
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"database disk image is malformed ({verdict})")
