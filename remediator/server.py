"""The remediator's HTTP side: the webhook, a read-only API, the status page, health, metrics.

The webhook answers 200 only after its requests are durable. Alertmanager retries 5xx and nothing
else, so what may work later is 503, and 4xx is kept for what will never be right.
"""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from exporter.logs import get_logger
from remediator.alertmanager import MessageError, Read, Reader
from remediator.config import Config, WebhookOptions
from remediator.journal import Journal, JournalError
from remediator.metrics import Metrics
from remediator.model import Phase
from remediator.status_page import status_page

log = get_logger("remediator.server")

_MOST = 1000  # remediations in one answer
_INERT = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Api:
    """The handlers; `routes` puts them into an application."""

    def __init__(
        self,
        *,
        journal: Journal,
        metrics: Metrics,
        reader: Callable[[], Reader],
        config: Callable[[], Config],
        accepted: Callable[[], None],
        reload: Callable[[], Awaitable[str]],
        title: str,
        dry_run: bool,
    ) -> None:
        """`accepted` is called when something was committed; `reload` gives the problem or ''."""
        self._journal = journal
        self._metrics = metrics
        self._reader = reader
        self._config = config
        self._accepted = accepted
        self._reload = reload
        self._title = title
        self._dry_run = dry_run
        self._in_flight = 0
        self._prefix = secrets.token_hex(4)  # a name for this process, and a number for the request
        self._number = 0
        self.ready = False
        """Whether the daemon has started and isn't stopping."""

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1)  # bodies are read here, with limits of their own
        app.router.add_post("/webhook", self.webhook)
        app.router.add_get("/api/v1/remediations", self.find)
        app.router.add_get("/api/v1/remediations/{id}", self.get)
        app.router.add_get("/", self.page)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/-/healthy", self.healthy)
        app.router.add_get("/-/ready", self.is_ready)
        app.router.add_post("/-/reload", self.reload)
        return app

    def answered(self, path: str, code: int) -> None:
        """Counts every answer to /webhook, refusals included."""
        if path == "/webhook":
            self._metrics.request(code)

    async def webhook(self, request: web.Request) -> web.Response:
        options = self._config().webhook
        given = request.headers.get("Content-Type")
        if given != "application/json" and request.content_type != "application/json":
            # Also keeps browsers out: a page elsewhere can't send this type without being asked.
            return _refused(415, "the Content-Type must be application/json")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            return _refused(415, "a compressed body is not accepted")
        body = await self._body(request, options)
        if isinstance(body, web.Response):
            return body
        self._number += 1
        request_id = f"{self._prefix}{self._number:x}"
        try:
            read = self._reader().read(body)
        except MessageError as error:
            log.warning("message refused", request=request_id, why=str(error))
            return _refused(400, str(error))
        return await self._commit(request_id, read)

    async def _commit(self, request_id: str, read: Read) -> web.Response:
        for problem in read.problems:
            log.warning("alert refused", request=request_id, why=problem)
        if read.outcomes.get("truncated"):
            log.error(
                "Alertmanager left alerts out; set max_alerts: 0 in its webhook_configs",
                request=request_id,
                count=read.outcomes["truncated"],
            )
        if not read.requests:
            self._metrics.alerts(read.outcomes)
            return _answer({"id": request_id, **read.outcomes})
        try:
            accepted = await self._journal.accept(read.requests, request_id)
        except JournalError as error:
            self._metrics.journal_error()
            log.error("message not accepted", request=request_id, why=str(error))
            response = _refused(503, "the journal can't be used now; the log says why")
            response.headers["Retry-After"] = "10"
            return response
        self._metrics.alerts(read.outcomes)
        for cancelled, fix in accepted.cancelled:
            self._metrics.cancelled(fix)
            log.info("cancelled: every alert resolved", remediation=cancelled, fix=fix)
        if accepted.created:
            log.info("accepted", request=request_id, created=accepted.created, **read.outcomes)
            self._accepted()
        return _answer({"id": request_id, **read.outcomes})

    async def _body(  # noqa: PLR0911 - one return a refusal
        self, request: web.Request, options: WebhookOptions
    ) -> bytes | web.Response:
        """The body within its limits of size and time, or the refusal."""
        too_large = f"the body is larger than {options.max_body_bytes} bytes"
        if (request.content_length or 0) > options.max_body_bytes:
            return _refused(413, too_large)
        if request.content.is_eof():  # here already, as small messages are
            return await request.content.read()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(options.body_timeout):
                async for chunk in request.content.iter_any():
                    size += len(chunk)
                    self._in_flight += len(chunk)
                    chunks.append(chunk)
                    if size > options.max_body_bytes:
                        return _refused(413, too_large)
                    if self._in_flight > options.max_bytes_in_flight:
                        return _refused(503, "too much is being sent at once; try again")
        except TimeoutError:
            # Not 408: Alertmanager would give the message up for good.
            return _refused(503, f"the body did not come within {options.body_timeout:g} s")
        except (web.PayloadAccessError, ValueError, OSError):
            return _refused(400, "the body ended early or can't be read")
        finally:
            self._in_flight -= size
        return b"".join(chunks)

    async def find(self, request: web.Request) -> web.Response:
        query = request.query
        if unknown := set(query) - {"fix", "phase", "target", "limit"}:
            return _refused(400, f"unknown parameter {min(unknown)!r}")
        try:
            phase = Phase(query["phase"]) if query.get("phase") else None
        except ValueError:
            return _refused(400, f"phase is one of {', '.join(Phase)}")
        limit = query.get("limit", "100")
        if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= _MOST:
            return _refused(400, f"limit is a number from 1 to {_MOST}")
        try:
            found = await self._journal.find(
                fix=query.get("fix", ""),
                phase=phase,
                target=query.get("target", ""),
                limit=int(limit),
            )
        except JournalError as error:
            return self._unavailable(error)
        return _shown(found)

    async def get(self, request: web.Request) -> web.Response:
        try:
            found = await self._journal.get(request.match_info["id"])
        except JournalError as error:
            return self._unavailable(error)
        if found is None:
            return _refused(404, "there is no such remediation")
        return _shown(found)

    async def page(self, request: web.Request) -> web.Response:
        try:
            counts = await self._journal.counts()
            active = [
                found
                for phase in (Phase.RUNNING, Phase.ADMITTED, Phase.PENDING)
                for found in await self._journal.find(phase=phase, limit=100)
            ]
            recent = await self._journal.find(limit=100)
            chosen = await self._journal.get(request.query["id"]) if "id" in request.query else None
        except JournalError as error:
            return self._unavailable(error)
        text = status_page(
            title=self._title,
            dry_run=self._dry_run,
            config=self._config(),
            counts=counts,
            active=active,
            recent=recent,
            chosen=chosen,
        )
        return web.Response(text=text, content_type="text/html", headers=_INERT)

    async def metrics(self, _request: web.Request) -> web.Response:
        try:
            counts = await self._journal.counts()
        except JournalError as error:
            self._metrics.journal_error()
            log.error("the journal can't be read", why=str(error))
            counts = None
        response = web.Response(body=self._metrics.text(counts))
        response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
        return response

    async def healthy(self, _request: web.Request) -> web.Response:
        return web.Response(text="Upkeep remediator is healthy.\n")

    async def is_ready(self, _request: web.Request) -> web.Response:
        if not self.ready:
            return web.Response(status=503, text="Upkeep remediator is starting or stopping.\n")
        try:
            await self._journal.counts()
        except JournalError as error:
            return self._unavailable(error)
        return web.Response(text="Upkeep remediator is ready.\n")

    async def reload(self, _request: web.Request) -> web.Response:
        if problem := await self._reload():
            return _refused(500, f"the old configuration stays in force: {problem}")
        return _answer({"reloaded": True})

    def _unavailable(self, error: JournalError) -> web.Response:
        self._metrics.journal_error()
        log.error("the journal can't be read", why=str(error))
        return _refused(503, "the journal can't be used now; the log says why")


def _answer(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value) + b"\n", content_type="application/json")


def _shown(value: object) -> web.Response:
    """An answer that is only true now, and for who asked."""
    response = _answer(value)
    response.headers["Cache-Control"] = "no-store"
    return response


def _refused(status: int, why: str) -> web.Response:
    response = web.Response(
        status=status,
        body=msgspec.json.encode({"error": why}) + b"\n",
        content_type="application/json",
    )
    response.force_close()  # whatever of the body is unread stays unread
    return response
