"""One address for several API servers, as an operator's load balancer gives it.

It does what kubeadm's guide has haproxy do: pass on TCP, ask each server for /readyz every second,
and give new connections only to those that are ready. Where a server takes a connection and says
nothing, which happens in the moment in which it ends, the client's greeting goes to the next one:
no request has been sent by then. It runs in a thread of the test process and ends with it.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

_CHECK_EVERY = 1.0
_CHECK_TIMEOUT = 3.0
_CONNECT_TIMEOUT = 2.0
_ANSWER_TIMEOUT = 5.0  # for the first byte of a TLS server's answer
_RETRIES_FOR = 15.0
_GREETING = 65536

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextmanager
def balancer(address: str, port: int, servers: Sequence[str]) -> Iterator[None]:
    """Listen on an address of the machine for `servers` (addresses; all have that port)."""
    running = _Balancer(port, servers)
    thread = threading.Thread(target=running.run, args=(address,), name="balancer", daemon=True)
    thread.start()
    try:
        running.await_start()
        yield
    finally:
        running.stop()
        thread.join(30)


class _Balancer:
    def __init__(self, port: int, servers: Sequence[str]) -> None:
        self._port = port
        self._servers = list(servers)
        self._ready: set[str] = set()
        self._turn = 0
        self._started = threading.Event()
        self._error: OSError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE  # it passes on what it can't read, and checks no one

    def run(self, address: str) -> None:
        """The thread."""
        try:
            asyncio.run(self._serve(address))
        except OSError as error:
            self._error = error
        finally:
            self._started.set()

    def await_start(self) -> None:
        """Until it listens. OSError where it can't."""
        self._started.wait(30)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it, with every connection."""
        if self._loop is not None and self._end is not None:
            with suppress(RuntimeError):  # it ended by itself
                self._loop.call_soon_threadsafe(self._end.set)

    async def _serve(self, address: str) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        checks = [asyncio.create_task(self._check(server)) for server in self._servers]
        tasks = set(checks)

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._handle(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, address, self._port)
        self._started.set()
        await self._end.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _check(self, server: str) -> None:
        while True:
            if await self._is_ready(server):
                self._ready.add(server)
            else:
                self._ready.discard(server)
            await asyncio.sleep(_CHECK_EVERY)

    async def _is_ready(self, server: str) -> bool:
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                reader, writer = await asyncio.open_connection(server, self._port, ssl=self._tls)
                try:
                    writer.write(f"GET /readyz HTTP/1.0\r\nHost: {server}\r\n\r\n".encode())
                    return b" 200 " in await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            greeting = await reader.read(_GREETING)
            if greeting and (found := await self._open(greeting)) is not None:
                there, answer = found
                writer.write(answer)
                try:
                    await asyncio.gather(_pass_on(reader, there[1]), _pass_on(there[0], writer))
                finally:
                    there[1].close()
        except OSError:
            pass  # the client went
        finally:
            writer.close()

    async def _open(self, greeting: bytes) -> tuple[_Streams, bytes] | None:
        """A server that answers the greeting, and its answer."""
        ends = asyncio.get_running_loop().time() + _RETRIES_FOR
        while asyncio.get_running_loop().time() < ends:
            self._turn += 1
            turn = self._turn % len(self._servers)
            order = self._servers[turn:] + self._servers[:turn]
            for server in sorted(order, key=lambda s: s not in self._ready):
                if found := await self._try(server, greeting):
                    return found
            await asyncio.sleep(0.2)
        return None

    async def _try(self, server: str, greeting: bytes) -> tuple[_Streams, bytes] | None:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                reader, writer = await asyncio.open_connection(server, self._port)
        except (OSError, TimeoutError):
            return None
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                writer.write(greeting)
                answer = await reader.read(_GREETING)
        except (OSError, TimeoutError):
            answer = b""
        if not answer:
            writer.close()
            return None
        return (reader, writer), answer


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All bytes until the end of one direction; a break ends both."""
    try:
        while data := await reader.read(_GREETING):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.close()
        raise
