"""What the engine's tests share: a daemon as a process, messages as Alertmanager sends them."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from remediator.host import HostClock
from remediator.journal.sqlite import SqliteJournal
from remediator.model import Request, Target

ROOT = Path(__file__).resolve().parents[2]
NODE = "node-1"
STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
JSON = {"Content-Type": "application/json"}


class StubClock:
    """Both clocks, moved by hand and apart from each other."""

    def __init__(self) -> None:
        self.boot_id = "boot-1"
        self.wall = STARTED
        self.boot = 1000.0

    def now(self) -> datetime:
        return self.wall

    def boottime(self) -> float:
        return self.boot

    def pass_time(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.boot += seconds

    def step(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self.wall += timedelta(seconds=seconds)


def request(
    pod: str = "web-1",
    *,
    fix: str = "mend-file",
    firing: bool = True,
    fingerprint: str = "",
    starts_at: datetime = STARTED,
) -> Request:
    return Request(
        fix=fix,
        target=Target(node=NODE, pod=pod),
        fingerprint=fingerprint or f"fp-{pod}",
        alert="FileThere",
        starts_at=starts_at,
        firing=firing,
    )


def alert(
    pod: str,
    *,
    status: str = "firing",
    fix: str = "mend-file",
    node: str = NODE,
    starts_at: str = "2026-01-02T03:04:05.123456789Z",
    **labels: str,
) -> dict[str, Any]:
    """One alert as Alertmanager 0.25 sends it."""
    names = {"alertname": "FileThere", "remediation": fix, "node": node, "pod": pod, **labels}
    return {
        "status": status,
        "labels": names,
        "annotations": {"summary": "a file is there"},
        "startsAt": starts_at,
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus.example:9090/graph",
        "fingerprint": sha256(pod.encode()).hexdigest()[:16],
    }


def message(*alerts: Mapping[str, Any], **more: Any) -> bytes:
    """A webhook message, version 4."""
    return json.dumps(
        {
            "receiver": "upkeep-remediator",
            "status": "firing",
            "alerts": alerts,
            "groupLabels": {},
            "commonLabels": {},
            "commonAnnotations": {},
            "externalURL": "http://alertmanager.example:9093",
            "version": "4",
            "groupKey": '{}:{remediation="mend-file"}',
            "truncatedAlerts": 0,
            **more,
        }
    ).encode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Daemon:
    """`upkeep-remediator serve` with the fix `mend-file`, as a process of its own."""

    def __init__(
        self,
        directory: Path,
        *,
        flags: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.files = directory / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.journal = directory / "journal" / "remediator.db"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config_file = directory / "remediator.yml"
        self.log_file = directory / "log"
        self._flags = flags
        self._prefix = prefix
        self.write_config(config, policy, settings)
        self.process: subprocess.Popen[bytes] | None = None

    def write_config(
        self,
        config: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        fix = {
            "cooldown": 0,
            "max_acts": 10_000,
            "max_concurrent": 4,
            **(policy or {}),
            "settings": {"directory": str(self.files), **(settings or {})},
        }
        values = {"fixes": {"mend-file": fix}, **(config or {})}
        self.config_file.write_text(yaml.safe_dump(values))

    def _command(self, name: str, *arguments: str) -> list[str]:
        return [
            *(sys.executable, "-m", "tests.engine.mend_file", name),
            f"--config.file={self.config_file}",
            f"--journal={self.journal}",
            *arguments,
        ]

    def start(self) -> "Daemon":
        flags = (
            f"--web.listen-address=127.0.0.1:{self.port}",
            f"--path.locks={self.directory / 'locks'}",
            f"--node-name={NODE}",
            *self._flags,
        )
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix, *self._command("serve", *flags)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        return self

    async def ready(self, timeout: float = 60.0) -> "Daemon":
        """Wait until it answers at all."""
        assert self.process is not None
        ends = time.monotonic() + timeout
        while time.monotonic() < ends:
            if self.process.poll() is not None:
                raise AssertionError(f"it ended: {self.log()}")
            with contextlib.suppress(OSError, aiohttp.ClientError, TimeoutError):
                status, _ = await self.get("/-/healthy")
                if status in (200, 401):
                    return self
            await asyncio.sleep(0.1)
        raise AssertionError(f"it does not answer: {self.log()}")

    def cli(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One command of the command line, beside the daemon or without it."""
        command = self._command(name, *arguments)
        if name == "run":
            command += [f"--path.locks={self.directory / 'locks'}", f"--node-name={NODE}"]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def break_(self, *pods: str) -> None:
        for pod in pods:
            (self.files / pod).touch()

    def acts(self) -> list[str]:
        path = self.files / "acts"
        return path.read_text().split() if path.exists() else []

    async def post(
        self, body: bytes, headers: Mapping[str, str] = JSON, path: str = "/webhook"
    ) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url + path, data=body, headers=headers) as response,
        ):
            return response.status, await response.text()

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session,
            session.get(self.url + path, headers=headers) as response,
        ):
            return response.status, await response.text()

    async def remediations(self, query: str = "?limit=1000") -> list[dict[str, Any]]:
        status, text = await self.get(f"/api/v1/remediations{query}")
        assert status == 200, text
        found: list[dict[str, Any]] = json.loads(text)
        return found

    async def settled(self, count: int = 1, timeout: float = 60.0) -> list[dict[str, Any]]:
        """Wait until at least `count` remediations are there and all have ended."""
        ends = time.monotonic() + timeout
        while True:
            found = await self.remediations()
            over = {"Succeeded", "Failed", "Skipped"}
            if len(found) >= count and all(r["phase"] in over for r in found):
                return found
            if time.monotonic() > ends:
                raise AssertionError(f"not settled: {found}\n{self.log()}")
            await asyncio.sleep(0.05)

    async def metric(self, name: str, **labels: str) -> float:
        """The value of one series of /metrics; KeyError where it's absent."""
        _, text = await self.get("/metrics")
        for line in text.splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                given = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if given == labels:
                    return float(found[3])
        raise KeyError((name, labels))


@contextlib.asynccontextmanager
async def running(directory: Path, **options: Any) -> AsyncIterator[Daemon]:
    """A daemon that answers; stopped at the end."""
    daemon = Daemon(directory, **options).start()
    try:
        yield await daemon.ready()
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.stop()


@contextlib.asynccontextmanager
async def opened(daemon: Daemon) -> AsyncIterator[SqliteJournal]:
    """The daemon's journal, as the command line opens it."""
    journal = SqliteJournal(daemon.journal, HostClock(), read_only=True)
    try:
        yield journal
    finally:
        await journal.aclose()


async def killed_while_acting(directory: Path) -> Daemon:
    """A daemon that was ended by SIGKILL right after it had acted on `web-1`."""
    daemon = Daemon(directory, settings={"delay": 30}).start()
    await daemon.ready()
    daemon.break_("web-1")
    await daemon.post(message(alert("web-1")))
    while daemon.acts() != ["web-1"]:
        await asyncio.sleep(0.02)
    daemon.kill()
    return daemon


def is_root() -> bool:
    return os.geteuid() == 0
