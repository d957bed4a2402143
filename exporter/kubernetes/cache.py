"""A view of the cluster that is kept up to date by one list and one watch for each resource.

Every resource runs on its own: list in pages, then watch with bookmarks; on 410 Gone list again; on
anything else that breaks, go on from the last known version after a pause that grows. The view
knows how old it is: since when the slowest resource has heard nothing from the API server.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from exporter.checks.view import ClusterView
from exporter.kubernetes.client import ApiError, Client
from exporter.kubernetes.decode import Kind
from exporter.logs import get_logger

log = get_logger("exporter.kubernetes")

T = TypeVar("T")

WATCH_SECONDS = 240.0
"""How long the server keeps one watch open."""
TOO_OLD = 120.0
"""Seconds without a sign of life after which a view is no longer worth a metric. A quiet watch
brings a bookmark a minute."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0
_VERSION_EVERY = 300.0


class _Meta(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class _Object(msgspec.Struct):
    metadata: _Meta


_decode_meta = msgspec.json.Decoder(_Object).decode


class Resource(Generic[T]):
    """How one kind of object gets into a view and out of it."""

    def __init__(
        self,
        kind: Kind[T],
        put: Callable[[T], None],
        drop: Callable[[str], None],
        *,
        keys: Callable[[], set[str]],
        labels: str = "",
        optional: bool = False,
        before: Kind[T] | None = None,
    ) -> None:
        self.kind = kind
        self.put = put
        self.drop = drop
        self.keys = keys
        self.labels = labels
        self.optional = optional
        """Whether the view is useful without it, where it may not be read or isn't served."""
        self.before = before
        """The same in an older API version, for servers that don't serve the newer one."""

    def fall_back(self) -> bool:
        """Use the older API version from now on; False where there is none left to try."""
        if self.before is None:
            return False
        self.kind, self.before = self.before, None
        return True


class Reflector(Generic[T]):
    """Keeps one resource of a view up to date. `lock` guards the view."""

    def __init__(
        self,
        client: Client,
        resource: Resource[T],
        lock: threading.Lock,
        *,
        clock: Callable[[], float] = time.monotonic,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        self._client = client
        self._resource = resource
        self._watch_seconds = watch_seconds
        self._lock = lock
        self._clock = clock
        self._version = ""
        self.confirmed_at: float | None = None
        """Clock time at which the view was last known to be current; None before the first list."""
        self.problem = ""
        """Why it isn't current now, in words; empty while all is well."""
        self.failing_since = 0.0
        """Clock time since which there is a problem."""
        self.absent = False
        """An optional resource that can't be had."""

    @property
    def name(self) -> str:
        return self._resource.kind.resource

    async def run(self) -> None:
        """Go on until cancelled."""
        pause = _FIRST_PAUSE
        while True:
            try:
                if not self._version:
                    await self._list()
                pause = _FIRST_PAUSE
                await self._watch()
                continue
            except ApiError as error:
                if error.status == 410:
                    self._version = ""
                    continue
                if error.status == 404 and self._resource.fall_back():
                    continue
                self._note(str(error), absent=error.status in {403, 404})
                if error.status in {403, 404}:
                    pause = _LONGEST_PAUSE
                wait = max(pause, error.retry_after)
            except Exception as error:
                # Nobody else would start it again, and the view would only grow old.
                log.exception("a watch failed", resource=self.name)
                self._note(f"{self.name}: {error!r}", absent=False)
                self._version, wait = "", pause
            await asyncio.sleep(wait * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load only
            pause = min(pause * 2, _LONGEST_PAUSE)
            if self._outdated():
                self._version = ""  # a list is sooner current than a watch that has to catch up

    def _outdated(self) -> bool:
        return self.confirmed_at is not None and self._clock() - self.confirmed_at > TOO_OLD / 2

    def _note(self, problem: str, *, absent: bool) -> None:
        self.absent = absent and self._resource.optional
        if self.absent and problem != self.problem:
            log.info("the view does without a resource", resource=self.name, why=problem)
        if not self.problem:
            self.failing_since = self._clock()
        self.problem = problem  # the collector fails with it, and logs that once

    def _confirm(self, at: float) -> None:
        self.confirmed_at, self.problem, self.absent = at, "", False

    async def _list(self) -> None:
        resource, asked_at = self._resource, self._clock()
        seen: set[str] = set()
        more = ""
        while True:
            page = await self._client.page(resource.kind, labels=resource.labels, more=more)
            with self._lock:
                for item in page.items:
                    seen.add(_key(item))
                    resource.put(self._read(item))
            more = page.more
            if not more:
                break
        with self._lock:
            for key in resource.keys() - seen:
                resource.drop(key)
        self._version = page.resource_version
        self._confirm(asked_at)

    async def _watch(self) -> None:
        resource = self._resource
        async for event in self._client.watch(
            resource.kind, self._version, labels=resource.labels, timeout=self._watch_seconds
        ):
            meta = _meta(event.object)
            if event.type != "BOOKMARK":
                with self._lock:
                    if event.type == "DELETED":
                        resource.drop(_spell(meta))
                    else:
                        resource.put(self._read(event.object))
            self._version = meta.resource_version
            self._confirm(self._clock())
        self._confirm(self._clock())  # ended in good order: everything until now has come

    def _read(self, raw: msgspec.Raw) -> T:
        try:
            return self._resource.kind.read(raw)
        except ValueError as error:  # a DecodeError is one
            # An object left out would make room appear where there is none.
            raise ApiError(0, f"{self.name} {_key(raw)} can't be read: {error}") from None


def _spell(meta: _Meta) -> str:
    return f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name


def _meta(raw: msgspec.Raw) -> _Meta:
    try:
        return _decode_meta(raw).metadata
    except ValueError as error:  # a DecodeError is one
        raise ApiError(0, f"an object can't be read: {error}") from None


def _key(raw: msgspec.Raw) -> str:
    return _spell(_meta(raw))


class Cache:
    """A `ClusterView` with its reflectors. Read `view` only while holding `lock`."""

    def __init__(
        self,
        client: Client,
        view: ClusterView,
        resources: list[Resource[T]],
        *,
        clock: Callable[[], float] = time.monotonic,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        self.lock = threading.Lock()
        self.view = view
        self._clock = clock
        self._client = client
        self.reflectors = [
            Reflector(client, one, self.lock, clock=clock, watch_seconds=watch_seconds)
            for one in resources
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._version_known = False
        self._version_problem = ""

    async def start(self) -> None:
        """Begin; returns at once. The view is of use when `age()` is a number."""
        self._tasks = [
            asyncio.create_task(one.run(), name=f"watch {one.name}") for one in self.reflectors
        ]
        self._tasks.append(asyncio.create_task(self._follow_version(), name="API version"))

    async def _follow_version(self) -> None:
        """Know the server's version, which an upgrade may change; ask anew every few minutes."""
        while True:
            try:
                version = await self._client.version()
            except ApiError as error:
                self._version_problem = str(error)
                await asyncio.sleep(_FIRST_PAUSE if not self._version_known else _LONGEST_PAUSE)
                continue
            with self.lock:
                self.view.honours_deletion_cost = version >= (1, 22)
            self._version_known = True
            await asyncio.sleep(_VERSION_EVERY)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def age(self) -> float | None:
        """Seconds since the slowest resource was current; None until every one has been listed."""
        ages = [
            None if one.confirmed_at is None else self._clock() - one.confirmed_at
            for one in self.reflectors
            if not one.absent
        ]
        known = [age for age in ages if age is not None]
        if not self._version_known:
            return None
        return max(known, default=0.0) if len(known) == len(ages) else None

    def failed_for(self) -> float:
        """Seconds since a resource began to fail; 0 where none does."""
        began = [one.failing_since for one in self.reflectors if one.problem and not one.absent]
        return self._clock() - min(began) if began else 0.0

    def problem(self) -> str:
        """What keeps the view from being current, in words; empty if nothing does."""
        for one in self.reflectors:
            if one.problem and not one.absent:
                return one.problem
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                return f"{task.get_name()} ended: {error!r}"
        if not self._version_known:
            return self._version_problem or "still reading the API server's version"
        waiting = [
            one.name for one in self.reflectors if one.confirmed_at is None and not one.absent
        ]
        return f"still reading {', '.join(waiting)}" if waiting else ""
