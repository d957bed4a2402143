"""A real pair of Alertmanagers, gossiping, with `kill -9` and a cut network to the remediator."""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest
import yaml

from deploy.local.alertmanager import alertmanager_command
from tests.engine.support import NODE, Daemon, free_port, running


class Wire:
    """The network between the pair and the remediator: a relay that can be cut and mended."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._cut = False
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)

    def cut(self) -> None:
        """What is under way breaks off in the middle; nothing new comes through."""
        self._cut = True
        for writer in self._open:
            writer.transport.abort()

    def mend(self) -> None:
        self._cut = False

    async def aclose(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):
            there_reader, there = await asyncio.open_connection("127.0.0.1", self._target)
            self._open |= {writer, there}
            try:
                await asyncio.gather(_pump(reader, there), _pump(there_reader, writer))
            finally:
                self._open -= {writer, there}
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class Pair:
    """Two Alertmanagers that send to one webhook."""

    def __init__(self, directory: Path, webhook: str) -> None:
        self._directory = directory
        self._gossip = [free_port(), free_port()]
        self.ports = [free_port(), free_port()]
        self.processes: list[subprocess.Popen[bytes] | None] = [None, None]
        self.config = directory / "alertmanager.yml"
        receiver = {"url": webhook, "send_resolved": True, "max_alerts": 0}
        route = {
            "receiver": "remediator",
            "group_by": ["remediation", "node", "pod"],
            "group_wait": "1s",
            "group_interval": "2s",
            "repeat_interval": "4s",
        }
        receivers = [{"name": "remediator", "webhook_configs": [receiver]}]
        self.config.write_text(yaml.safe_dump({"route": route, "receivers": receivers}))

    def start(self, number: int) -> None:
        with (self._directory / f"alertmanager-{number}.log").open("ab") as log:
            self.processes[number] = subprocess.Popen(
                [
                    *alertmanager_command(),
                    f"--config.file={self.config}",
                    f"--storage.path={self._directory / f'am-{number}'}",
                    f"--web.listen-address=127.0.0.1:{self.ports[number]}",
                    f"--cluster.listen-address=127.0.0.1:{self._gossip[number]}",
                    f"--cluster.peer=127.0.0.1:{self._gossip[1 - number]}",
                    "--cluster.settle-timeout=2s",
                    "--cluster.peer-timeout=2s",
                ],
                stdout=log,
                stderr=log,
            )

    def kill(self, number: int) -> None:
        process = self.processes[number]
        assert process is not None
        process.kill()
        process.wait()

    async def ready(self, number: int) -> None:
        ends = time.monotonic() + 120
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get(
                        f"http://127.0.0.1:{self.ports[number]}/-/ready"
                    ) as response:
                        if response.status == 200:
                            return
                assert time.monotonic() < ends, "Alertmanager doesn't get ready"
                await asyncio.sleep(0.2)

    async def fire(self, *pods: str) -> None:
        """As Prometheus does: to every Alertmanager that answers, again and again."""
        alerts = [
            {
                "labels": {
                    "alertname": "FileThere",
                    "remediation": "mend-file",
                    "node": NODE,
                    "pod": pod,
                },
                "startsAt": datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
            }
            for pod in pods
        ]
        async with aiohttp.ClientSession() as session:
            for port in self.ports:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.post(
                        f"http://127.0.0.1:{port}/api/v2/alerts", json=alerts
                    ) as response:
                        assert response.status == 200, await response.text()


@pytest.fixture
def pair_directory(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "pair"
    folder.mkdir()
    yield folder


@contextlib.asynccontextmanager
async def pair_of(directory: Path, daemon: Daemon) -> AsyncIterator[tuple[Pair, Wire]]:
    wire = Wire(daemon.port)
    await wire.start()
    pair = Pair(directory, f"http://127.0.0.1:{wire.port}/webhook")
    try:
        for number in (0, 1):
            pair.start(number)
        for number in (0, 1):
            await pair.ready(number)
        yield pair, wire
    finally:
        for number in (0, 1):
            if pair.processes[number] is not None:
                pair.kill(number)
        await wire.aclose()


async def mended(daemon: Daemon, pair: Pair, *pods: str) -> None:
    """Keep the alerts firing until every file is gone."""
    ends = time.monotonic() + 120
    while any((daemon.files / pod).exists() for pod in pods):
        assert time.monotonic() < ends, daemon.log()
        await pair.fire(*[pod for pod in pods if (daemon.files / pod).exists()])
        await asyncio.sleep(1)


@pytest.mark.debian
async def test_e3_a_real_pair_has_each_condition_mended_once(
    tmp_path: Path, pair_directory: Path
) -> None:
    async with running(tmp_path) as daemon, pair_of(pair_directory, daemon) as (pair, wire):
        daemon.break_("web-1", "web-2", "web-3")
        await pair.fire("web-1", "web-2", "web-3")
        await mended(daemon, pair, "web-1", "web-2", "web-3")

        # Cut off: Alertmanager tries again until the network is back.
        wire.cut()
        daemon.break_("web-4")
        await pair.fire("web-4")
        await asyncio.sleep(4)
        assert (daemon.files / "web-4").exists()
        wire.mend()
        await mended(daemon, pair, "web-4")

        # One of the pair dies: the other delivers.
        pair.kill(0)
        daemon.break_("web-5")
        await mended(daemon, pair, "web-5")
        pair.start(0)
        await pair.ready(0)

        # The remediator dies with requests under way, and comes back.
        daemon.break_("web-6", "web-7")
        await pair.fire("web-6", "web-7")
        await asyncio.sleep(0.9)
        daemon.kill()
        daemon.start()
        await daemon.ready()
        await mended(daemon, pair, "web-6", "web-7")

        # Repeats of both, for two repeat intervals and more: nothing is done twice.
        await pair.fire(*[f"web-{n}" for n in range(1, 8)])
        await asyncio.sleep(10)
        assert sorted(daemon.acts()) == [f"web-{n}" for n in range(1, 8)]
        assert {r["phase"] for r in await daemon.settled(7)} <= {"Succeeded", "Skipped"}
