"""Hands what is due in the journal to the worker, oldest first, a bounded number at a time.

The journal is the queue: nothing is kept in memory that a restart would lose. It's asked when a
webhook has committed something and once a second, which also finds what the command line changed.
"""

import asyncio
import contextlib
from collections.abc import Callable

from exporter.logs import get_logger
from remediator.config import Config
from remediator.journal import Journal, JournalError
from remediator.worker import Worker

log = get_logger("remediator.scheduler")

_TICK = 1.0  # seconds
_RATE = 20.0  # remediations of one fix taken up in a second: a storm must not starve the webhook
_BURST = 32.0
_AT_ONCE = 32  # remediations of one fix that are checked or waited for at the same time
_PRUNE_EVERY = 600.0  # seconds


class Scheduler:
    """Runs until stopped."""

    def __init__(self, journal: Journal, worker: Worker, config: Callable[[], Config]) -> None:
        self._journal = journal
        self._worker = worker
        self._config = config
        self._tasks: dict[str, dict[str, asyncio.Task[None]]] = {name: {} for name in worker.fixes}
        self._tokens = dict.fromkeys(worker.fixes, _BURST)
        self._filled_at = 0.0
        self._wake = asyncio.Event()
        self._stopping = False
        self._failing = ""

    def wake(self) -> None:
        """Something was committed: look now."""
        self._wake.set()

    async def run(self) -> None:
        """Look and hand over until `stop`."""
        loop = asyncio.get_running_loop()
        prune_at = loop.time()
        while not self._stopping:
            self._wake.clear()
            self._fill(loop.time())
            try:
                for fix in self._tasks:
                    await self._start_due_of(fix)
                if loop.time() >= prune_at:
                    prune_at = loop.time() + _PRUNE_EVERY
                    await self._prune()
                if self._failing:
                    log.info("the journal works again")
                self._failing = ""
            except JournalError as error:
                if self._failing != str(error):
                    log.error("nothing can be taken up", why=str(error))
                self._failing = str(error)
            except Exception:
                log.exception("unexpected error")
            with contextlib.suppress(TimeoutError):
                if min(self._tokens.values(), default=_BURST) < 1:
                    await asyncio.sleep(4 / _RATE)  # something may be left for which none was left
                else:
                    await asyncio.wait_for(self._wake.wait(), _TICK)

    def _fill(self, now: float) -> None:
        more = (now - self._filled_at) * _RATE
        self._filled_at = now
        for fix, tokens in self._tokens.items():
            self._tokens[fix] = min(_BURST, tokens + more)

    async def stop(self, grace: float) -> int:
        """Begin nothing more; wait `grace` seconds for what acts; how many are left then.

        Those are not cancelled: a half-done rotation that is undone in haste is worse off than one
        that the next start resumes from its steps. What only looks, or waits for its turn, is.
        """
        self._stopping = True
        acting = self._worker.stop()
        self.wake()
        tasks = [task for tasks in self._tasks.values() for task in tasks.values()]
        for task in tasks:
            if task.get_name() not in acting:
                task.cancel()
        if not tasks:
            return 0
        if acting:
            log.info("waits for what is under way", count=len(acting), seconds=grace)
        _, left = await asyncio.wait(tasks, timeout=grace)
        return len(left)

    async def _start_due_of(self, fix: str) -> None:
        """What goes wrong with one fix keeps none of the others waiting."""
        try:
            await self._start_due(fix)
        except JournalError:
            raise
        except Exception:
            log.exception("unexpected error", fix=fix)

    async def _start_due(self, fix: str) -> None:
        tasks = self._tasks[fix]
        room = min(_AT_ONCE - len(tasks), int(self._tokens[fix]))
        if room <= 0:
            return
        for remediation in await self._journal.due(fix, room + len(tasks)):
            if remediation.id in tasks or self._stopping:
                continue
            if room == 0:
                return
            room -= 1
            self._tokens[fix] -= 1
            task = asyncio.create_task(self._worker.handle(remediation), name=remediation.id)
            tasks[remediation.id] = task
            task.add_done_callback(lambda done: self._done(fix, done))

    def _done(self, fix: str, task: asyncio.Task[None]) -> None:
        self._tasks[fix].pop(task.get_name(), None)
        if len(self._tasks[fix]) == _AT_ONCE - 1:  # there was no room: what waits may begin
            self.wake()

    async def _prune(self) -> None:
        config = self._config()
        bounds, rules = config.journal, config.fixes.values()
        done = await self._journal.prune(
            max_age=bounds.max_age,
            max_records=bounds.max_records,
            horizon=max((max(r.cooldown, r.window) for r in rules), default=0.0),
        )
        if done:
            log.info("dropped old records", count=done)
