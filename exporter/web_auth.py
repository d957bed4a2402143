"""Who may ask: basic auth with bcrypt, a bearer token, names of client certificates.

Secrets are compared in constant time, and a user that doesn't exist costs what a wrong password
does. bcrypt is slow on purpose: it runs in a thread, a few at a time. Credentials that were right
are known again without it, so that who floods the port with wrong ones shuts nobody out.
"""

import asyncio
import base64
import hmac
import ipaddress
import os
import ssl
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import bcrypt
from aiohttp import web

from exporter.web_config import peer_names, spelt

_KEPT = 256  # wrong ones that are known again
_WAITING = 32  # checks that may wait; beyond it the client is told to come again
_WAITING_EACH = 8  # of them those of one neighbour
_KEY = os.urandom(32)


class _BusyError(Exception):
    """Too many credentials wait for their check."""


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
        self._client_names = frozenset(map(spelt, client_names))
        self.secret = bool(self._users) or bearer is not None
        """Whether clients send something that nobody else may learn."""
        self.guarded = self.secret or client_certificates
        """Whether anything at all is asked of a client."""
        self._right: dict[str, bytes] = {}
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="bcrypt")
        self._checking: dict[bytes, asyncio.Future[bool]] = {}
        self._waiting: Counter[str] = Counter()
        # Hashes of no password, one for each cost: made, not computed, which would take as long.
        self._nobodies = [
            bcrypt.gensalt(int(hashed[4:6])) + b"." * 31 for hashed in self._users.values()
        ]

    async def refusal(self, request: web.Request) -> web.Response | None:
        """The answer to a client that may not; None for one that may."""
        if self._client_names and not self._known_certificate(request):
            return _refused(403, "This client certificate is not allowed here.\n")
        if not self._users and self._bearer is None:
            return None
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        if self._bearer is not None:  # compared whatever came, so that nothing tells what was wrong
            token = value.strip() if scheme.lower() == "bearer" else ""
            if hmac.compare_digest(_digest(token.encode(errors="surrogateescape")), self._bearer):
                return None
        if scheme.lower() == "basic" and self._users:
            try:
                if await self._basic(value.strip(), _neighbour(request.remote)):
                    return None
            except _BusyError:
                return _refused(503, "Too many logins at once; try again.\n")
        response = _refused(401, "Unauthorized\n")
        response.headers["WWW-Authenticate"] = "Basic" if self._users else "Bearer"
        return response

    def _known_certificate(self, request: web.Request) -> bool:
        tls = request.get_extra_info("ssl_object")
        certificate = tls.getpeercert() if isinstance(tls, ssl.SSLObject) else None
        if not certificate:
            return False
        return not self._client_names.isdisjoint(peer_names(certificate))

    async def _basic(self, value: str, neighbour: str) -> bool:
        """Whether user and password are right. `_BusyError` where that can't be found out now."""
        try:
            user, colon, password = base64.b64decode(value, validate=True).partition(b":")
            name = user.decode()
        except ValueError:  # no base64, or no text
            return False
        if not colon:
            return False
        known = self._users.get(name)
        # The same stand-in each time: where costs differ, no cost tells who exists.
        hashed = known or self._nobodies[_digest(user)[0] % len(self._nobodies)]
        key = _digest(b"\0".join((user, password, hashed)))
        if self._right.get(name) == key:
            return True
        if key in self._wrong:
            return False
        right = await self._checked(key, password, hashed, neighbour) and known is not None
        if right:
            self._right[name] = key
            return True
        self._wrong[key] = None
        while len(self._wrong) > _KEPT:
            self._wrong.popitem(last=False)
        return False

    async def _checked(self, key: bytes, password: bytes, hashed: bytes, neighbour: str) -> bool:
        """What bcrypt says; the same credentials are checked once, however many bring them."""
        found = self._checking.get(key)
        if found is None:
            waiting = self._waiting
            if waiting.total() >= _WAITING or waiting[neighbour] >= _WAITING_EACH:
                raise _BusyError
            # bcrypt reads 72 bytes, as exporter-toolkit's does.
            found = asyncio.get_running_loop().run_in_executor(
                self._threads, bcrypt.checkpw, password[:72].replace(b"\0", b"\xff"), hashed
            )
            self._checking[key] = found
            waiting[neighbour] += 1
            found.add_done_callback(lambda _: self._forget(key, neighbour))
        return await asyncio.shield(found)

    def _forget(self, key: bytes, neighbour: str) -> None:
        del self._checking[key]
        self._waiting[neighbour] -= 1
        if not self._waiting[neighbour]:
            del self._waiting[neighbour]


def _refused(status: int, why: str) -> web.Response:
    response = web.Response(status=status, text=why)
    response.force_close()  # what is left of its body is thrown away, and the connection ends
    return response


def _neighbour(remote: str | None) -> str:
    """Whose checks are counted together: an address, or of IPv6 the network of one customer."""
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return address.packed[:8].hex()
    return str(address)


def _digest(value: bytes) -> bytes:
    return hmac.digest(_KEY, value, "sha256")
