"""The few API calls Upkeep makes, on a plain HTTP client, with errors a person understands.

Reads are retried while it makes sense; a write is sent once, with the uid and resourceVersion it
was decided on, and whoever sent it looks again if the answer was lost.
"""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec
from yarl import URL

from exporter.kubernetes.access import Access, AccessError
from exporter.kubernetes.decode import Kind

T = TypeVar("T")

REQUEST_TIMEOUT = 30.0  # seconds for one answer, or one page of a list
PAGE = 500  # objects a page, as kubectl asks for
_RETRIES = 6
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
_RELOAD_PAUSE = 10.0  # seconds between two readings of the credentials


class ApiError(Exception):
    """The API server said no, or nothing. `status` is the HTTP code, 0 where there was none."""

    def __init__(self, status: int, message: str, reason: str = "", retry_after: float = 0) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        """The Status object's reason code: Conflict, Expired, NotFound, …"""
        self.retry_after = retry_after

    @property
    def temporary(self) -> bool:
        """Whether asking again may help: no answer, overload, or a fault of the server."""
        return self.status in {0, 408, 429} or self.status >= 500


class NoAccessError(ApiError, AccessError):
    """The credentials can't be read (now): for whoever asks, the same as no answer."""


class _Details(msgspec.Struct, rename="camel"):
    retry_after_seconds: float = 0


class _Status(msgspec.Struct, rename="camel"):
    message: str = ""
    reason: str = ""
    code: int = 0
    details: _Details | None = None


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class Page(msgspec.Struct, frozen=True):
    """A part of a list; `resource_version` is that of the whole."""

    items: list[msgspec.Raw]
    resource_version: str
    more: str
    """The continue token, or empty."""


class WatchEvent(msgspec.Struct):
    """One line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""

    type: str
    object: msgspec.Raw


class _Version(msgspec.Struct):
    major: str
    minor: str


_decode_list = msgspec.json.Decoder(_List).decode
_decode_event = msgspec.json.Decoder(WatchEvent).decode
_decode_status = msgspec.json.Decoder(_Status).decode


class Client:
    """A connection to one API server. Close it, or use it as an async context manager."""

    def __init__(
        self,
        load: Callable[[], Awaitable[Access]],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        request_timeout: float = REQUEST_TIMEOUT,
    ) -> None:
        self._load = load
        self._sleep = sleep
        self._timeout = request_timeout
        self._access: Access | None = None
        self._session: aiohttp.ClientSession | None = None
        self._loaded_at = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        session, self._session, self._access = self._session, None, None
        if session is not None:
            await session.close()

    async def _connect(self) -> tuple[Access, aiohttp.ClientSession]:
        if self._access is None or self._session is None:
            await self.aclose()
            try:
                self._access = await self._load()
            except AccessError as error:
                raise NoAccessError(0, str(error)) from None
            self._loaded_at = time.monotonic()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._access.tls or False, limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                # Compression would cost the API server more than the network saves.
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                auto_decompress=True,
            )
        return self._access, self._session

    async def _renew(self) -> bool:
        """Read the credentials again (kubeadm may have renewed them); False if just done."""
        if time.monotonic() - self._loaded_at < _RELOAD_PAUSE:
            return False
        await self.aclose()
        return True

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> bytes:
        """One request, one answer's body; `ApiError` for anything but success."""
        for attempt in (1, 2):
            response = None
            try:
                async with asyncio.timeout(self._timeout):
                    response = await self._request(
                        method, path, query, body=body, content_type=content_type
                    )
                    async with response:
                        data = await response.read()
                        if response.status < 300:
                            return data
                        if response.status == 401 and attempt == 1 and await self._renew():
                            continue
                        raise _refused(method, path, response, data)
            except TimeoutError:
                raise ApiError(
                    0, f"{method} {path}: no answer within {self._timeout:g} s"
                ) from None
            except (aiohttp.ClientError, OSError) as error:
                raise self._unreachable(method, path, error) from None
        raise AssertionError("unreachable: the second attempt returns or raises")

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        *,
        body: Any = None,
        content_type: str = "application/json",
        read_timeout: float | None = None,
    ) -> aiohttp.ClientResponse:
        access, session = await self._connect()
        headers = {"Content-Type": content_type} if body is not None else {}
        if authorization := access.authorization():
            headers["Authorization"] = authorization
        return await session.request(
            method,
            URL(access.server + path).with_query(dict(query or {})),
            data=msgspec.json.encode(body) if body is not None else None,
            headers=headers,
            proxy=access.proxy or None,
            server_hostname=access.server_name or None,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=read_timeout),
        )

    def _unreachable(self, method: str, path: str, error: Exception) -> ApiError:
        server = self._access.server if self._access else "the API server"
        if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLError):
            why = "its certificate is not trusted by the kubeconfig's authority, or ours is refused"
        else:
            why = str(error) or type(error).__name__
        return ApiError(0, f"{method} {path}: can't reach {server}: {why}")

    async def _retried(self, what: Callable[[], Awaitable[T]]) -> T:
        pause = _FIRST_PAUSE
        for _ in range(_RETRIES - 1):
            try:
                return await what()
            except ApiError as error:
                if not error.temporary or isinstance(error, NoAccessError):
                    raise
                await self._sleep(min(max(pause, error.retry_after), _LONGEST_PAUSE))
                pause *= 2
        return await what()

    async def get(self, kind: Kind[T], namespace: str, name: str) -> T:
        """One object, read from the store itself (no resourceVersion: a quorum read)."""
        path = kind.path(namespace, name)
        return _read(kind, await self._retried(lambda: self.send("GET", path)), path)

    async def page(
        self,
        kind: Kind[T],
        namespace: str = "",
        *,
        labels: str = "",
        fields: str = "",
        more: str = "",
        limit: int = PAGE,
    ) -> Page:
        """One page of a list, consistent with the pages before it."""
        query = {"limit": str(limit)}
        if both := ",".join(part for part in (kind.fields, fields) if part):
            query["fieldSelector"] = both
        if labels:
            query["labelSelector"] = labels
        if more:
            query["continue"] = more
        path = kind.path(namespace)
        data = await self._retried(lambda: self.send("GET", path, query=query))
        try:
            listed = _decode_list(data)
        except msgspec.DecodeError as error:
            raise ApiError(0, f"GET {path}: the answer is no list: {error}") from None
        return Page(listed.items or [], listed.metadata.resource_version, listed.metadata.continue_)

    async def list(
        self, kind: Kind[T], namespace: str = "", *, labels: str = "", fields: str = ""
    ) -> list[T]:
        """Every object, read from the store itself; begun again if it expires half-way (410)."""
        for _ in range(3):
            found: list[T] = []
            more = ""
            try:
                while True:
                    page = await self.page(kind, namespace, labels=labels, fields=fields, more=more)
                    found += [_read(kind, item, kind.path(namespace)) for item in page.items]
                    more = page.more
                    if not more:
                        return found
            except ApiError as error:
                if error.status != 410:
                    raise
        raise ApiError(410, f"GET {kind.path(namespace)}: the list expired three times half-way")

    async def watch(
        self,
        kind: Kind[T],
        resource_version: str,
        *,
        labels: str = "",
        timeout: float = 240.0,  # noqa: ASYNC109 - the server's own time limit for the watch
        silence: float = 90.0,
    ) -> AsyncIterator[WatchEvent]:
        """The changes after `resource_version`, bookmarks included, until the server ends it.

        Raises `ApiError` (410: list again), also where nothing came for `silence` seconds, in
        which even a quiet watch has a bookmark.
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(int(timeout)),
        }
        if kind.fields:
            query["fieldSelector"] = kind.fields
        if labels:
            query["labelSelector"] = labels
        path = kind.path()
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._request("GET", path, query, read_timeout=silence)
        except TimeoutError:
            raise ApiError(0, f"watch {path}: no answer within {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable("watch", path, error) from None
        async with response:
            if response.status != 200:
                if response.status == 401:
                    await self._renew()
                raise _refused("watch", path, response, await response.read())
            rest = b""
            try:
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield _event(line, path)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                why = "silent for too long" if isinstance(error, TimeoutError) else str(error)
                raise ApiError(0, f"watch {path}: broken off: {why}") from None

    async def patch(
        self,
        kind: Kind[T],
        namespace: str,
        name: str,
        *,
        uid: str,
        resource_version: str,
        change: dict[str, Any],
    ) -> T:
        """Merge-patch exactly the object that was looked at; 409 where it has changed since."""
        metadata = {**change.get("metadata", {}), "uid": uid, "resourceVersion": resource_version}
        path = kind.path(namespace, name)
        data = await self.send(
            "PATCH",
            path,
            body={**change, "metadata": metadata},
            content_type="application/merge-patch+json",
        )
        return _read(kind, data, path)

    async def delete(
        self, kind: Kind[T], namespace: str, name: str, *, uid: str, resource_version: str
    ) -> None:
        """Delete exactly the object that was looked at; 409 where it has changed since."""
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "preconditions": {"uid": uid, "resourceVersion": resource_version},
        }
        await self.send("DELETE", kind.path(namespace, name), body=body)

    async def version(self) -> tuple[int, int]:
        """The API server's (major, minor); a vendor's `21+` is 21."""
        data = await self._retried(lambda: self.send("GET", "/version"))
        try:
            found = msgspec.json.decode(data, type=_Version)
            minor = "".join(c for c in found.minor if c.isdigit())
            return int(found.major or 0), int(minor or 0)
        except ValueError as error:  # a DecodeError is one
            raise ApiError(0, f"GET /version: the answer is no version: {error}") from None


def _read(kind: Kind[T], raw: bytes | msgspec.Raw, path: str) -> T:
    try:
        return kind.read(raw)
    except ValueError as error:  # a DecodeError is one
        raise ApiError(0, f"GET {path}: an object can't be read: {error}") from None


def _event(line: bytes, path: str) -> WatchEvent:
    try:
        event = _decode_event(line)
        if event.type == "ERROR":
            status = _decode_status(event.object)
            raise ApiError(status.code, f"watch {path}: {status.message}", status.reason)
    except msgspec.DecodeError as error:
        raise ApiError(0, f"watch {path}: a line can't be read: {error}") from None
    return event


def _refused(method: str, path: str, response: aiohttp.ClientResponse, data: bytes) -> ApiError:
    try:
        status = _decode_status(data)
    except msgspec.DecodeError:
        status = _Status(message=(response.reason or "no reason given"))
    remedy = {
        401: "; the credentials are refused: renew the kubeconfig or the token",
        403: "; grant it with the ClusterRole that docs/rollouts.md shows",
    }.get(response.status, "")
    after = status.details.retry_after_seconds if status.details else 0
    header = response.headers.get("Retry-After", "")
    return ApiError(
        response.status,
        f"{method} {path}: {response.status} {status.message}{remedy}",
        status.reason,
        max(after, float(header) if header.isdigit() else 0),
    )


__all__ = ["AccessError", "ApiError", "Client", "Page", "WatchEvent"]
