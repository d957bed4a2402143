"""Listens with the exporter-toolkit web configuration, for both programs.

Certificates and credentials are rotated by replacing files: they are looked at every few seconds
and taken over without dropping the listening socket. Files that can't be used leave the old ones
in force, and are named in the log.
"""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import cast

import msgspec
from aiohttp import web

from exporter.logs import get_logger
from exporter.web_auth import Access
from exporter.web_config import TlsConfig, WebConfig, WebConfigError, load, tls_context
from exporter.web_site import Site, at_most

__all__ = ["Demands", "Listener", "WebConfigError", "loopback"]

log = get_logger("web")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LOOK = 2.0  # seconds between two looks at the files and the idle connections


def loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to `host`."""
    try:
        if host == "localhost":  # whatever it resolves to here is listened on
            host = _resolved(host, 0)[1]
        return ipaddress.ip_address(host).is_loopback
    except (OSError, ValueError):
        return False


class Demands(msgspec.Struct, frozen=True, kw_only=True):
    """What a program asks of its listener beside the web configuration file."""

    bearer_token_file: Path | None = None
    max_connections: int = 512
    """Beyond it idle ones are closed, first those that never asked anything."""
    never_open: str = ""
    """Why it may not be open to everybody, said where it would be; empty where it may."""


class Listener:
    """Serves one application on one address."""

    def __init__(
        self,
        app: web.Application,
        address: tuple[str, int],
        config_file: Path | None = None,
        *,
        demands: Demands | None = None,
        hot: Mapping[tuple[str, str], Handler] | None = None,
        answered: Callable[[str, int], None] | None = None,
        idle_timeout: float = 75.0,
        request_timeout: float = 15.0,
    ) -> None:
        """`hot`: by method and path, handlers of the application's that are asked without its
        router and middlewares, which cost as much as a small handler does. `answered` is told the
        path and status code of every answer, refusals included. `request_timeout`: seconds a new
        connection has to send the head of its first request.
        """
        self._app = app
        self._hot = dict(hot or {})
        self._answered = answered
        self._address = address
        self._config_file = config_file
        self._demands = demands or Demands()
        self._idle_timeout = idle_timeout
        self._request_timeout = request_timeout
        self._config = WebConfig()
        self._access = Access()
        self._tls: ssl.SSLContext | None = None
        self._stamp: object = None
        self._busy: set[asyncio.BaseTransport] = set()
        self._idle_since: dict[asyncio.BaseTransport, tuple[float, bool]] = {}
        self._runner: web.AppRunner | None = None
        self._site: Site | None = None
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def guarded(self) -> bool:
        """Whether anything is asked of a client: credentials or a verified certificate."""
        return self._access.guarded

    @property
    def port(self) -> int:
        """The port it listens on, once started."""
        if self._socket is None:
            raise RuntimeError("not listening yet")
        return int(self._socket.getsockname()[1])

    @property
    def scheme(self) -> str:
        return "http" if self._tls is None else "https"

    def load(self, demands: Demands | None = None) -> None:
        """Read the files; `WebConfigError` leaves what was in force, older demands included."""
        demands = demands or self._demands
        stamp = self._look()
        config = WebConfig() if self._config_file is None else load(self._config_file)
        tls, folder = config.tls_server_config, Path()
        if self._config_file is not None:
            folder = self._config_file.parent
        context = None if tls is None else tls_context(tls, folder)
        bearer = demands.bearer_token_file
        access = Access(
            users=config.basic_auth_users,
            bearer=None if bearer is None else _token(bearer),
            client_names=tls.client_allowed_sans if tls else (),
            client_certificates=context is not None and context.verify_mode is ssl.CERT_REQUIRED,
        )
        if demands.never_open and not access.guarded:
            raise WebConfigError(demands.never_open)
        self._access, self._demands = access, demands
        self._config, self._tls, self._stamp = config, context, stamp

    async def start(self) -> None:
        """Listen. `OSError` where the address can't be had; `WebConfigError`."""
        if self._stamp is None:
            self.load()
        self._socket = _listening(*self._address)
        if self._access.secret and self._tls is None and not loopback(self._address[0]):
            log.warning(
                "passwords and tokens cross the network unencrypted: give tls_server_config"
            )
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            keepalive_timeout=self._idle_timeout,
            handle_signals=False,
            shutdown_timeout=5.0,
        )
        await self._runner.setup()
        self._stand_before(self._runner)
        await self._serve()
        self._task = asyncio.create_task(self._watch())

    async def reload(self, demands: Demands | None = None) -> None:
        """Take over changed files; `WebConfigError` leaves what was in force."""
        before = self._tls
        self.load(demands)
        if self._runner is not None and (before is not None or self._tls is not None):
            try:
                await self._serve()
            except OSError:
                self._stamp = None  # not in force yet: tried again at the next look
                raise

    async def aclose(self) -> None:
        """Stop listening, let what is being answered end (5 s), close the rest."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._runner is not None:
            await self._runner.cleanup()
        if self._socket is not None:
            self._socket.close()

    async def _serve(self) -> None:
        """Accept with the TLS context in force; the socket's queue of connections stays."""
        if self._runner is None or self._socket is None:
            return
        old = self._site
        self._site = Site(self._runner, self._socket.dup(), self._tls)
        await self._site.start()
        if old is not None:
            await old.stop()
            self._end_connections()

    def _connections(self) -> list[web.RequestHandler]:
        server = self._runner.server if self._runner is not None else None
        return [] if server is None else server.connections

    def _end_connections(self) -> None:
        """Each once it is answered: it may have been let in by what was taken away."""
        for connection in self._connections():
            if (transport := connection.transport) is not None and transport not in self._busy:
                transport.close()
            connection.close()

    def _stand_before(self, runner: web.AppRunner) -> None:
        """Let every request come here before the application sees it."""
        server = runner.server
        if server is None:
            raise RuntimeError("the runner is not set up")
        behind = cast("Handler", server.request_handler)
        hot, expect = self._hot, "Expect"

        async def answer(request: web.Request) -> web.StreamResponse:
            refusal = await self._access.refusal(request)
            if refusal is not None:
                return refusal
            handler = hot.get((request.method, request.path))
            # Only the application knows how to say "100 Continue".
            return await (behind if handler is None or expect in request.headers else handler)(
                request
            )

        async def guard(request: web.Request) -> web.StreamResponse:
            transport = request.transport
            if transport is not None:
                self._busy.add(transport)
            code = 500
            try:
                response = await answer(request)
                code = response.status
            except web.HTTPException as error:
                code = error.status
                self._dress(error)
                raise
            finally:
                if self._answered is not None:
                    self._answered(request.path, code)
                if transport is not None:
                    self._busy.discard(transport)
                    self._idle_since[transport] = (time.monotonic(), True)
            self._dress(response)
            return response

        server.request_handler = cast(
            "Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]", guard
        )

    def _dress(self, response: web.StreamResponse) -> None:
        """Give it the headers of the web configuration."""
        for name, value in self._config.http_server_config.headers.items():
            response.headers.setdefault(name, value)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            try:
                self._close_idle()
                if self._look() == self._stamp:
                    continue
                await self.reload()
                log.info("web configuration reloaded")
            except WebConfigError as error:
                self._stamp = self._look()
                log.error("the old web configuration stays in force", why=str(error))
            except Exception:
                log.exception("the look at connections and files failed; it is tried again")

    def _look(self) -> object:
        """Something that differs once any file was replaced or written."""
        files = [f for f in (self._config_file, self._demands.bearer_token_file) if f is not None]
        tls = self._config.tls_server_config or TlsConfig()
        if self._config_file is not None:
            names = (tls.cert_file, tls.key_file, tls.client_ca_file)
            files += [self._config_file.parent / name for name in names if name]
        return tuple((str(file), _stat(file)) for file in files)

    def _close_idle(self) -> None:
        """Close who connects and says nothing, and the longest idle where there are too many."""
        now = time.monotonic()
        open_now: list[asyncio.BaseTransport] = [
            p.transport for p in self._connections() if p.transport is not None
        ]
        idle = {t: self._idle_since.get(t, (now, False)) for t in open_now if t not in self._busy}
        self._idle_since = idle
        for transport, (since, served) in idle.items():
            if not served and now - since > self._request_timeout:
                transport.close()
            elif now - since > self._idle_timeout + _LOOK and isinstance(
                transport, asyncio.Transport
            ):
                transport.abort()  # idle ones have gone by now: this one doesn't read its answer
        excess = len(open_now) - at_most(self._demands.max_connections)
        if excess > 0:  # who has been answered is known; who never asked is not
            for transport in sorted(idle, key=lambda t: (idle[t][1], idle[t][0]))[:excess]:
                transport.close()


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise WebConfigError(f"the bearer token file {path} can't be read: {why}") from None
    if len(token) < 16:
        raise WebConfigError(f"the bearer token in {path} is shorter than 16 characters")
    return token


def _stat(path: Path) -> object:
    try:
        found = path.stat()
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _listening(host: str, port: int) -> socket.socket:
    """A listening socket; an empty host means every address, IPv4 and IPv6."""
    if not host:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    family, address = _resolved(host, port)
    return socket.create_server((address, port), family=family, backlog=1024)


def _resolved(host: str, port: int) -> tuple[int, str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return family, str(address[0])
