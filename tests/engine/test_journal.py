"""The SQLite journal: the contract, and what is SQLite's own."""

import asyncio
import random
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from remediator.journal import Accepted, ConflictError, JournalError
from remediator.journal.accepting import Known
from remediator.journal.sqlite import SqliteJournal
from remediator.journal.writer import open_journal
from remediator.model import Phase, Request, Step
from tests.engine.journal_contract import ADMIT, MINE, SEEN, JournalContract
from tests.engine.support import STARTED, StubClock, request


@pytest.fixture
def clock() -> StubClock:
    return StubClock()


@pytest.fixture
async def journal(tmp_path: Path, clock: StubClock) -> AsyncIterator[SqliteJournal]:
    opened = SqliteJournal(tmp_path / "j" / "remediator.db", clock)
    yield opened
    await opened.aclose()


class TestSqliteJournal(JournalContract):
    """The contract on a file."""


async def test_durability_is_that_of_a_power_cut(journal: SqliteJournal) -> None:
    """No test can cut the power: the settings that SQLite documents for it are held instead."""
    await journal.accept([request()], "r1")
    connection = open_journal(journal.path, 1.0, 10_000, check=True)
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    connection.close()
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


async def test_the_store_itself_forbids_two_active_and_a_change_of_the_end(
    journal: SqliteJournal,
) -> None:
    await journal.accept([request()], "r1")
    connection = sqlite3.connect(journal.path, isolation_level=None)
    copy = (
        "INSERT INTO remediations (id, fix, target, target_json, origin, phase, created_at, "
        "last_seen_at) SELECT 'x', fix, target, target_json, origin, phase, 0, 0 FROM remediations"
    )
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute(copy)
    await journal.finish("r1-0", Phase.FAILED, "Refused", "no")
    with pytest.raises(sqlite3.IntegrityError, match="terminal"):
        connection.execute("UPDATE remediations SET phase = 'Pending'")
    connection.close()


async def test_many_callers_share_a_commit_and_each_gets_his_answer(journal: SqliteJournal) -> None:
    answers = await asyncio.gather(
        *(journal.accept([request(f"web-{n % 20}")], f"r{n}") for n in range(200)),
        journal.finish("nobody", Phase.FAILED, "x", "x"),
        return_exceptions=True,
    )
    assert isinstance(answers.pop(), ConflictError)
    assert sum(a.created for a in answers if isinstance(a, Accepted)) == 20
    assert len(await journal.find(limit=1000)) == 20


async def test_too_many_waiting_are_refused_until_some_have_ended(
    tmp_path: Path, clock: StubClock
) -> None:
    journal = SqliteJournal(tmp_path / "j.db", clock, max_active=3)
    await journal.accept([request(f"web-{n}") for n in range(3)], "r1")
    with pytest.raises(JournalError, match="as many as may"):
        await journal.accept([request("web-9")], "r2")
    await journal.finish("r1-0", Phase.FAILED, "x", "x")
    assert (await journal.accept([request("web-9")], "r3")).created == 1
    await journal.aclose()


async def test_e38_where_as_many_wait_as_may_what_needs_no_room_is_taken(
    tmp_path: Path, clock: StubClock
) -> None:
    """Alertmanager repeats what waits, and what has resolved is what makes room."""
    journal = SqliteJournal(tmp_path / "j.db", clock, max_active=3)
    three = [request(f"web-{n}") for n in range(3)]
    await journal.accept(three, "r1")
    another = [request("web-1", fingerprint="another"), request("web-1", fingerprint="third")]
    journal.bound(max_bytes=None, max_active=2)  # by a reload
    assert (await journal.accept(three, "r2")).coalesced == 3
    assert (await journal.accept(another, "r3")).coalesced == 2
    with pytest.raises(JournalError, match="as many as may"):
        await journal.accept([*three, request("web-9")], "r4")
    gone = await journal.accept([request(f"web-{n}", firing=False) for n in (0, 2)], "r5")
    assert len(gone.cancelled) == 2
    answers = await asyncio.gather(
        *(journal.accept([request(f"new-{n}")], f"s{n}") for n in range(5)), return_exceptions=True
    )
    assert sum(isinstance(a, Accepted) for a in answers) == 1
    await journal.aclose()


async def test_e39_webhooks_that_fill_the_journal_leave_room_for_what_runs(
    tmp_path: Path, clock: StubClock
) -> None:
    journal = SqliteJournal(tmp_path / "j.db", clock, max_bytes=1)
    await journal.accept([request("runs"), request("waits")], "r1")
    await journal.admit("r1-0", ADMIT)
    await journal.claim("r1-0", MINE, SEEN, None)
    large = [request(f"web-{n}") for n in range(15_000)]
    step = Step(name="mend", message="mend it", started_at=STARTED)
    refused, recorded = await asyncio.gather(
        journal.accept(large, "large"),
        journal.record_step("r1-0", MINE, 0, step),
        return_exceptions=True,
    )
    assert isinstance(refused, JournalError)
    assert "raise journal.max_bytes" in str(refused)
    assert recorded is None  # in the same commit
    assert (await journal.accept([large[0]], "small")).created == 1
    with pytest.raises(JournalError, match=r"raise journal\.max_bytes"):
        for number in range(1000):
            await journal.accept(large[number * 15 : number * 15 + 15], f"m{number}")
    for index in range(50):
        step = Step(name="mend", message="x" * 10_000, started_at=STARTED)
        await journal.record_step("r1-0", MINE, index, step)
    await journal.finish("r1-0", Phase.SUCCEEDED, "Mended", "yes", claim=MINE)
    with pytest.raises(JournalError, match=r"raise journal\.max_bytes"):
        await journal.accept([request("runs")], "r2")
    for found in await journal.find(limit=10_000):
        if not found.phase.terminal:
            await journal.finish(found.id, Phase.FAILED, "x", "x")
    clock.pass_time(1)
    await journal.prune(max_age=3600, max_records=0)
    assert (await journal.accept([request("runs")], "r2")).created == 1
    await journal.aclose()


async def test_e39_alerts_that_only_join_leave_that_room_too(
    tmp_path: Path, clock: StubClock
) -> None:
    journal = SqliteJournal(tmp_path / "j.db", clock, max_bytes=1)
    await journal.accept([request("runs")], "r1")
    await journal.admit("r1-0", ADMIT)
    await journal.claim("r1-0", MINE, SEEN, None)
    joining = [request("runs", fingerprint=f"{n:016x}") for n in range(40_000)]
    with pytest.raises(JournalError, match=r"raise journal\.max_bytes"):
        for number in range(100):
            await journal.accept(joining[number * 400 : number * 400 + 400], f"m{number}")
    assert (await journal.accept([request("runs")], "repeat")).coalesced == 1  # nothing to write
    await journal.record_step(
        "r1-0", MINE, 0, Step(name="mend", message="x" * 500_000, started_at=STARTED)
    )
    await journal.aclose()


async def test_what_goes_wrong_with_one_piece_of_work_is_no_fault_of_the_others(
    journal: SqliteJournal,
) -> None:
    def broken(_connection: sqlite3.Connection) -> None:
        raise ZeroDivisionError

    await journal.accept([request()], "r1")
    answers = await asyncio.gather(
        journal._writer.run(broken),
        journal.accept([request("other")], "r2"),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [ZeroDivisionError, JournalError]
    assert (await journal.accept([request("other")], "r3")).created == 1


async def test_its_size_is_bounded_anew_while_it_is_open(journal: SqliteJournal) -> None:
    await journal.accept([request()], "r1")
    journal.bound(max_bytes=1, max_active=20_000)  # as little as it goes
    with pytest.raises(JournalError, match=r"raise journal\.max_bytes"):
        for number in range(1000):
            await journal.accept([request(f"web-{number}-{n}") for n in range(10)], f"m{number}")
    journal.bound(max_bytes=None, max_active=20_000)
    assert (await journal.accept([request("after")], "r2")).created == 1
    journal.bound(max_bytes=None, max_active=1)
    with pytest.raises(JournalError, match="1 remediations wait"):
        await journal.accept([request("one-more")], "r3")


async def test_no_thread_to_be_had_is_a_journal_that_cannot_be_used(
    journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(JournalError, match="new thread"):
            await journal.accept([request()], "r1")
    assert (await journal.accept([request()], "r2")).created == 1
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(JournalError, match="new thread"):
            await journal.find()
    assert len(await journal.find()) == 1


async def test_e44_the_threads_of_the_fixes_and_the_journals_are_apart(
    journal: SqliteJournal,
) -> None:
    """A look at a disk that hangs can't be cancelled: it keeps its thread."""
    await journal.accept([request()], "r1")
    loop, over = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    hangs = loop.run_in_executor(None, over.wait, 60)
    try:
        assert len(await asyncio.wait_for(journal.find(), 10)) == 1
    finally:
        over.set()
        await hangs


async def test_a_folder_that_cannot_be_looked_into_is_a_journal_that_cannot_be_used(
    clock: StubClock,
) -> None:
    journal = SqliteJournal(Path("/tmp") / ("x" * 300) / "j.db", clock)
    with pytest.raises(JournalError, match="can't be read"):
        await journal.find()
    await journal.aclose()


async def test_an_alert_known_when_it_came_is_written_if_its_remediation_ended_meanwhile(
    journal: SqliteJournal,
) -> None:
    """Messages are made ready before they wait for the journal's thread."""
    await journal.accept([request()], "r1")
    await journal.accept([request()], "r2")  # known by now
    _, answer = await asyncio.gather(
        journal.finish("r1-0", Phase.FAILED, "x", "x"), journal.accept([request()], "r3")
    )
    assert answer.created == 1
    _, answer = await asyncio.gather(
        journal.accept([request(firing=False)], "r4"), journal.accept([request()], "r5")
    )
    assert answer.created == 1


def test_what_is_forgotten_is_gone_before_its_generation_is() -> None:
    """Another thread may look in between: with the new generation it must find nothing old."""
    seen: list[int] = []

    class Watched(set[Request]):
        def discard(self, element: object) -> None:
            seen.append(known.generation)
            super().discard(element)

    known = Known()
    known._held = Watched()
    known.add(request())
    known.forget(request().fix, request().target)
    assert (seen, known.generation, known.has(request())) == ([0], 1, False)


async def test_another_process_ending_one_is_seen_by_the_next_alert(
    journal: SqliteJournal, clock: StubClock
) -> None:
    """The memory of known alerts must not outlive what it knows."""
    await journal.accept([request()], "r1")
    await journal.accept([request()], "r2")  # known by now
    other = SqliteJournal(journal.path, clock)
    await other.finish("r1-0", Phase.FAILED, "x", "x")
    await other.aclose()
    assert (await journal.accept([request()], "r3")).created == 1


async def test_an_alert_that_joins_what_another_process_ends_just_then_begins_anew(
    journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only joins is written without a transaction: it must notice where it joined nothing."""
    await journal.accept([request()], "r1")
    ended: list[bool] = []
    fit = Known.fit

    def fit_and_end(known: Known, connection: sqlite3.Connection) -> None:
        fit(known, connection)
        if not ended:
            with sqlite3.connect(journal.path) as other:
                other.execute("UPDATE remediations SET phase = 'Failed', ended_at = 1")
            ended.append(True)

    monkeypatch.setattr(Known, "fit", fit_and_end)
    assert (await journal.accept([request(fingerprint="other")], "r2")).created == 1
    assert ended


async def test_only_what_joins_goes_without_a_transaction(journal: SqliteJournal) -> None:
    await journal.accept([request()], "r1")
    statements: list[str] = []
    connection = journal._writer._connection
    assert connection is not None
    connection.set_trace_callback(statements.append)
    await journal.accept([request(fingerprint="other")], "r2")
    assert not [s for s in statements if s.startswith("BEGIN")]
    found = sqlite3.connect(journal.path).execute("SELECT count(*) FROM alerts").fetchone()
    assert found == (2,)  # seen by others: committed
    await journal.accept([request("else")], "r3")
    await journal.accept([request(firing=False)], "r4")
    assert len([s for s in statements if s.startswith("BEGIN")]) == 2


async def test_a_journal_of_something_else_is_refused(tmp_path: Path, clock: StubClock) -> None:
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (x)")
    connection.commit()
    connection.close()
    journal = SqliteJournal(path, clock)
    with pytest.raises(JournalError, match="not a journal of this version"):
        await journal.accept([request()], "r1")
    await journal.aclose()


async def test_a_journal_of_a_newer_version_is_not_even_read(
    journal: SqliteJournal, clock: StubClock
) -> None:
    await journal.accept([request()], "r1")
    connection = sqlite3.connect(journal.path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    reading = SqliteJournal(journal.path, clock, read_only=True)
    with pytest.raises(JournalError, match="not a journal of this version"):
        await reading.find()
    await reading.aclose()


async def test_messages_agree_with_a_plain_model(
    journal: SqliteJournal, seed: int, soak: bool
) -> None:
    """Random firing and resolved messages, batched or not, against a few lines that do the same."""
    choice = random.Random(seed)
    active: dict[str, dict[str, tuple[float, bool]]] = {}
    cancelled = 0
    for number in range(3000 if soak else 300):
        messages = [
            [_random_request(choice) for _ in range(choice.randint(1, 6))]
            for _ in range(choice.randint(1, 5))
        ]
        answers = await asyncio.gather(
            *(journal.accept(m, f"m{number}x{i}") for i, m in enumerate(messages))
        )
        for message, answer in zip(messages, answers, strict=True):
            assert answer.created + answer.coalesced + answer.resolved == len(message)
            cancelled -= len(answer.cancelled)
        for message in messages:
            cancelled += _model(active, message)
        assert cancelled == 0
        found = {r.target.pod for r in await journal.find(phase=Phase.PENDING)}
        assert found == set(active)
        if choice.random() < 0.3 and active:
            ended = choice.choice(sorted(active))
            (chosen,) = await journal.find(phase=Phase.PENDING, target=f"/{ended}/")
            await journal.finish(chosen.id, Phase.FAILED, "x", "x")
            del active[ended]


def _random_request(choice: random.Random) -> Request:
    return request(
        f"web-{choice.randrange(4)}",
        fingerprint=f"fp-{choice.randrange(3)}",
        firing=choice.random() < 0.6,
        starts_at=STARTED + timedelta(seconds=choice.randrange(5)),
    )


def _model(active: dict[str, dict[str, tuple[float, bool]]], message: list[Request]) -> int:
    """Apply a message; how many were cancelled. A run of resolved ones is judged at its end."""
    cancelled = 0
    touched: set[str] = set()

    def judge() -> int:
        gone = [p for p in touched if p in active and all(r for _, r in active[p].values())]
        for pod in gone:
            del active[pod]
        touched.clear()
        return len(gone)

    for item in message:
        pod, started = item.target.pod, item.starts_at.timestamp()
        if item.firing:
            cancelled += judge()
            alerts = active.setdefault(pod, {})
            if item.fingerprint not in alerts or alerts[item.fingerprint][0] < started:
                alerts[item.fingerprint] = (started, False)
        else:
            touched.add(pod)
            alert = active.get(pod, {}).get(item.fingerprint)
            if alert is not None and alert[0] <= started:
                active[pod][item.fingerprint] = (alert[0], True)
    return cancelled + judge()
