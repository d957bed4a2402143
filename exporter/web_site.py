"""Accepts connections as asyncio doesn't by itself: one at a time, and with bounds of its own.

Where the process has no file descriptor left, asyncio tries its whole backlog all the same, each
second, and logs every try with a traceback: 10 MB a second. And a TLS handshake may take a minute,
in which nothing else counts the connection.
"""

import asyncio
import resource
import socket
import ssl

from aiohttp import web

_QUEUE = 1024  # connections that the kernel holds for us
_HANDSHAKE = 10.0  # seconds


def at_most(connections: int) -> int:
    """How many to keep open: the other half of the file descriptors is for everything else."""
    return min(connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Site(web.SockSite):
    """Serves an application on a socket that listens already."""

    def __init__(
        self, runner: web.AppRunner, sock: socket.socket, ssl_context: ssl.SSLContext | None
    ) -> None:
        super().__init__(runner, sock, ssl_context=ssl_context)

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        if server is None:
            raise RuntimeError("the runner is not set up")
        self._server = await asyncio.get_running_loop().create_server(
            server,
            sock=self._sock,
            ssl=self._ssl_context,
            backlog=1,  # how many are accepted at a time; the kernel's queue is set again below
            ssl_handshake_timeout=_HANDSHAKE if self._ssl_context else None,
        )
        self._sock.listen(_QUEUE)
