"""Who may ask: basic auth with bcrypt, a bearer token, names of client certificates.

Secrets are compared in constant time, and a user that doesn't exist costs what a wrong password
does. bcrypt is slow on purpose: it runs in a thread, a few at a time, and its verdicts are kept.
"""

import asyncio
import base64
import hmac
import os
import ssl
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import bcrypt
from aiohttp import web

from exporter.web_config import peer_names

_KEPT = 256  # verdicts
_WAITING = 32  # checks that may wait; beyond it the client is told to come again
_KEY = os.urandom(32)


class Access:
    """The credentials in force; replaced as a whole when their files change."""

    def __init__(
        self,
        *,
        users: Mapping[str, str] | None = None,
        bearer: str | None = None,
        client_names: tuple[str, ...] = (),
        client_certificates: bool = False,
    ) -> None:
        """`bearer`: None where none is configured. `client_certificates`: TLS demands them."""
        self._users = {name: hashed.encode() for name, hashed in (users or {}).items()}
        self._bearer = None if bearer is None else _digest(bearer.encode())
        self._client_names = frozenset(client_names)
        self.guarded = bool(self._users) or bearer is not None or client_certificates
        """Whether anything at all is asked of a client."""
        self._verdicts: OrderedDict[bytes, bool] = OrderedDict()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="bcrypt")
        self._waiting = 0
        some = next(iter(self._users.values()), bcrypt.gensalt(10))
        self._nobody = bcrypt.hashpw(os.urandom(16), bcrypt.gensalt(int(some[4:6])))

    async def refusal(self, request: web.Request) -> web.Response | None:
        """The answer to a client that may not; None for one that may."""
        if self._client_names and not self._known_certificate(request):
            return web.Response(status=403, text="This client certificate is not allowed here.\n")
        if not self._users and self._bearer is None:
            return None
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        if self._bearer is not None:  # compared whatever came, so that nothing tells what was wrong
            token = value.strip() if scheme.lower() == "bearer" else ""
            if hmac.compare_digest(_digest(token.encode(errors="surrogateescape")), self._bearer):
                return None
        if scheme.lower() == "basic" and self._users:
            if self._waiting >= _WAITING:
                return web.Response(status=503, text="Too many logins at once; try again.\n")
            if await self._basic(value.strip()):
                return None
        response = web.Response(status=401, text="Unauthorized\n")
        response.headers["WWW-Authenticate"] = "Basic" if self._users else "Bearer"
        response.force_close()  # an unread body of someone unknown isn't read at all
        return response

    def _known_certificate(self, request: web.Request) -> bool:
        tls = request.get_extra_info("ssl_object")
        certificate = tls.getpeercert() if isinstance(tls, ssl.SSLObject) else None
        if not certificate:
            return False
        return not self._client_names.isdisjoint(peer_names(certificate))

    async def _basic(self, value: str) -> bool:
        try:
            user, colon, password = base64.b64decode(value, validate=True).partition(b":")
            name = user.decode()
        except ValueError:  # no base64, or no text
            return False
        if not colon:
            return False
        known = self._users.get(name)
        hashed = known if known is not None else self._nobody
        key = _digest(b"\0".join((user, password, hashed)))
        verdict = self._verdicts.get(key)
        if verdict is None:
            self._waiting += 1
            try:
                loop = asyncio.get_running_loop()
                # bcrypt reads 72 bytes, as exporter-toolkit's does.
                right = await loop.run_in_executor(
                    self._threads, bcrypt.checkpw, password[:72].replace(b"\0", b"\xff"), hashed
                )
            finally:
                self._waiting -= 1
            verdict = right and known is not None
            self._verdicts[key] = verdict
            while len(self._verdicts) > _KEPT:
                self._verdicts.popitem(last=False)
        else:
            self._verdicts.move_to_end(key)
        return verdict


def _digest(value: bytes) -> bytes:
    return hmac.digest(_KEY, value, "sha256")
