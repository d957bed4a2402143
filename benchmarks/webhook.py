"""The webhook: durably accepted messages against an aiohttp handler that only parses the same body.

Both servers are processes of their own, asked by the same client over the same number of
connections in alternating rounds, so that the ratio doesn't depend on the machine's mood. The
remediator runs as shipped: journal on disk, synchronous=FULL, worker and log included.

    python -m benchmarks.webhook            rate, latency and time to the first step
    python -m benchmarks.webhook --million  the memory over 1,000,000 alerts
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import msgspec
import psutil
from aiohttp import web

from tests.engine.support import Daemon, alert, free_port, message

ALERTS = 10  # in each message
CONNECTIONS = 64
SECONDS = 4.0  # of each round
ROUNDS = 4
TARGETS = 500  # containers that alerts come from
NEW_EPISODES = 0.2  # share of alerts that are new to the journal, and not repeats


def bodies(seed: int) -> Iterator[bytes]:
    """Messages of ten alerts each, endlessly: repeats of known alerts, and new episodes."""
    choice = random.Random(seed)
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    starts = [begun] * TARGETS
    for _ in count():
        group = []
        for target in choice.sample(range(TARGETS), ALERTS):
            if choice.random() < NEW_EPISODES:
                starts[target] += timedelta(seconds=1)
            group.append(alert(f"web-{target}", starts_at=starts[target].isoformat()))
        yield message(*group)


def requests(seed: int, port: int, number: int = 2000) -> list[bytes]:
    """Whole HTTP requests, made beforehand: the client must not be what is measured."""
    made = []
    for body, _ in zip(bodies(seed), range(number), strict=False):
        head = (
            f"POST /webhook HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


class Client:
    """Keep-alive connections of one server."""

    def __init__(self, port: int, prepared: Sequence[bytes]) -> None:
        self._port = port
        self._prepared = prepared
        self._next = 0
        self.statuses: dict[int, int] = {}
        self.latencies: list[float] = []

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._next = (self._next + 1) % len(self._prepared)
        begun = time.perf_counter()
        writer.write(self._prepared[self._next])
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        self.latencies.append(time.perf_counter() - begun)
        status = int(head[9:12])
        self.statuses[status] = self.statuses.get(status, 0) + 1

    async def flood(self, seconds: float, most: float = float("inf")) -> float:
        """As fast as it answers, for so long or so many; requests per second."""
        begun = time.perf_counter()
        left = most

        async def connection() -> None:
            nonlocal left
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            while time.perf_counter() - begun < seconds and left > 0:
                left -= 1
                await self._ask(reader, writer)
            writer.close()

        self.statuses, self.latencies = {}, []
        await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
        return sum(self.statuses.values()) / (time.perf_counter() - begun)

    async def pace(self, rate: float, seconds: float) -> None:
        """At a fixed rate, whether or not the earlier ones are answered."""
        self.statuses, self.latencies = {}, []
        connections = [
            await asyncio.open_connection("127.0.0.1", self._port) for _ in range(CONNECTIONS)
        ]
        free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        for pair in connections:
            free.put_nowait(pair)
        lateness: list[float] = []

        async def one(due: float) -> None:
            pair = await free.get()
            await self._ask(*pair)
            lateness.append(time.perf_counter() - due)
            free.put_nowait(pair)

        begun = time.perf_counter()
        tasks = []
        for number in range(int(rate * seconds)):
            due = begun + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
        self.latencies = lateness  # from when it was due: waiting for a connection counts
        for _, writer in connections:
            writer.close()


class _Alert(msgspec.Struct):
    status: str
    labels: dict[str, str]
    startsAt: datetime  # noqa: N815 - Alertmanager's name
    fingerprint: str


class _Message(msgspec.Struct):
    version: str
    alerts: list[_Alert]


def parse_only(port: int) -> None:
    """The yardstick: parse the body into the same fields, answer 200."""
    decoder = msgspec.json.Decoder(_Message)

    async def webhook(request: web.Request) -> web.Response:
        read = decoder.decode(await request.read())
        answer = json.dumps({"id": "0" * 12, "accepted": len(read.alerts)})
        return web.Response(text=answer, content_type="application/json")

    app = web.Application(client_max_size=32 << 20)
    app.router.add_post("/webhook", webhook)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def rates(daemon: Daemon, seed: int) -> float:
    """The ratio of the rates, of alternating rounds."""
    process = daemon.process
    assert process is not None
    port = free_port()
    yardstick = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.webhook", f"--yardstick={port}"]
    )
    try:
        await asyncio.sleep(3)
        ours = Client(daemon.port, requests(seed, daemon.port))
        theirs = Client(port, requests(seed, port))
        pairs = []
        for number in range(ROUNDS):
            (base, base_cost), (rate, cost) = [
                await _costed(client, pid)
                for client, pid in ((theirs, yardstick.pid), (ours, process.pid))
            ]
            assert set(theirs.statuses) == {200}, theirs.statuses
            assert set(ours.statuses) == {200}, ours.statuses
            pairs.append(rate / base)
            print(
                f"round {number + 1}: accepted durably {rate:.0f}/s, only parsed {base:.0f}/s, "
                f"ratio {rate / base:.2f}; CPU {cost * 1e6:.0f} and {base_cost * 1e6:.0f} us",
                flush=True,
            )
        return statistics.median(pairs)
    finally:
        yardstick.terminate()
        yardstick.wait()


async def _costed(client: Client, pid: int) -> tuple[float, float]:
    """Requests per second, and seconds of CPU for each, of the server with that pid."""
    before = sum(psutil.Process(pid).cpu_times()[:2])
    rate = await client.flood(SECONDS)
    spent = sum(psutil.Process(pid).cpu_times()[:2]) - before
    return rate, spent / sum(client.statuses.values())


async def latency(daemon: Daemon, seed: int) -> float:
    """p99 in seconds at 200 requests/s."""
    client = Client(daemon.port, requests(seed, daemon.port))
    await client.pace(200, 10)
    assert set(client.statuses) == {200}, client.statuses
    p50, p99 = percentile(client.latencies, 0.5), percentile(client.latencies, 0.99)
    print(f"200 requests/s: p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms", flush=True)
    return p99


async def first_step(daemon: Daemon) -> float:
    """Median seconds from accepted to the first step of the fix, when idle."""
    taken = []
    for number in range(20):
        daemon.break_(f"idle-{number}")
        await asyncio.sleep(0.3)
        status, _ = await daemon.post(message(alert(f"idle-{number}")))
        assert status == 200
    await daemon.settled()
    for found in await daemon.remediations("?target=idle-"):
        (whole,) = [json.loads((await daemon.get(f"/api/v1/remediations/{found['id']}"))[1])]
        begun = datetime.fromisoformat(whole["steps"][0]["started_at"])
        taken.append((begun - datetime.fromisoformat(whole["created_at"])).total_seconds())
    median = statistics.median(taken)
    print(
        f"accepted to first step: median {median * 1000:.0f} ms, worst {max(taken) * 1000:.0f} ms"
    )
    return median


def resident(pid: int) -> float:
    """MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


async def million(daemon: Daemon, seed: int, alerts: int = 1_000_000) -> tuple[float, float]:
    """Resident MiB after a tenth of the alerts, and after all."""
    assert daemon.process is not None
    client = Client(daemon.port, requests(seed, daemon.port))
    early = 0.0
    for part in range(10):
        rate = await client.flood(3600, alerts / ALERTS / 10)
        assert set(client.statuses) <= {200}, client.statuses
        now = resident(daemon.process.pid)
        early = early or now
        done = (part + 1) * alerts // 10
        size = daemon.journal.stat().st_size / 2**20
        print(f"{done} alerts: {now:.1f} MiB, journal {size:.1f} MiB, {rate:.0f}/s", flush=True)
    return early, now


async def main(seed: int) -> int:
    """Print the figures; 1 where one misses its mark."""
    print(f"seed {seed}; {ALERTS} alerts a message, {CONNECTIONS} connections")
    missed = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # a disk: /tmp may be memory
        daemon = Daemon(Path(folder)).start()
        try:
            await daemon.ready()
            if "--million" in sys.argv:
                early, late = await million(daemon, seed)
                if late > early * 1.1 + 5:
                    missed.append("memory grows")
            else:
                if await first_step(daemon) > 0.1:
                    missed.append("first step")
                ratio = await rates(daemon, seed)
                print(f"ratio {ratio:.2f} (mark: 0.5 or more)")
                if ratio < 0.5:
                    missed.append("rate")
                if await latency(daemon, seed) > 0.05:
                    missed.append("p99")
        finally:
            daemon.stop()
    print(f"missed: {', '.join(missed)}" if missed else "every mark met")
    return 1 if missed else 0


if __name__ == "__main__":
    option = next((a for a in sys.argv[1:] if a.startswith("--yardstick=")), None)
    if option:
        parse_only(int(option.partition("=")[2]))
    else:
        sys.exit(asyncio.run(main(random.SystemRandom().randrange(2**32))))
