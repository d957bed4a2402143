"""The exporter as a process: what it says at its start, and what a signal does to it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.support import ROOT, free_port

CONFIG = """
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: c}}]
current-context: c
"""


@contextlib.contextmanager
def running(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An exporter of rollouts alone that answers, and its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "exporter", f"--web.listen-address=127.0.0.1:{port}"]
    command += ["--no-collector.certificates", "--no-collector.zombies", *flags]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_until(lambda: "is healthy" in page(f"{url}/-/healthy"))
        yield process, url
    finally:
        process.terminate()
        process.wait(60)


def page(url: str) -> str:
    """What is answered; nothing where nobody answers yet."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 - our own URL
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return ""


def wait_until(done: Callable[[], bool], within: float = 60) -> None:
    ends = time.monotonic() + within
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't read {} (No such file or directory)"),
        ("clusters: [", "kubeconfig {} is not YAML, line 1; write it anew"),
        ("", "kubeconfig {} is empty or not a kubeconfig; give another --kubeconfig"),
        ("current-context: a", "kubeconfig {} has no context 'a'"),
        (CONFIG, None),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_said_once_at_the_start(
    tmp_path: Path, content: str | None, said: str | None
) -> None:
    file = tmp_path / "kubeconfig"
    if content is not None:
        file.write_text(content)
    with running(tmp_path, f"--kubeconfig={file}") as (_, url):
        text = page(f"{url}/metrics")
    assert 'upkeep_scrape_collector_success{collector="rollouts"} 0' in text
    lines = (tmp_path / "log").read_text().splitlines()
    found = [line for line in lines if "rollouts can't be seen until this is mended" in line]
    assert len(found) == (said is not None)
    assert said is None or said.format(file) in found[0]
    before = (
        [line for line in lines[: lines.index(found[0])] if "listening" in line] if said else []
    )
    assert before == []


def test_a_hangup_does_not_end_it(tmp_path: Path) -> None:
    """SIGHUP makes the remediator reload, so people send it here too."""
    with running(tmp_path) as (process, url):
        os.kill(process.pid, signal.SIGHUP)
        wait_until(lambda: "nothing to reload" in (tmp_path / "log").read_text())
        assert "is healthy" in page(f"{url}/-/healthy")
        assert process.poll() is None


@pytest.mark.parametrize("output", ["table", "json"])
def test_findings_that_nobody_reads_are_no_error(tmp_path: Path, output: str) -> None:
    (tmp_path / "a.crt").write_text("no certificate")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "exporter", "--check=certificates", "-o", output]
    command.append(f"--certificates.path={tmp_path}/*.crt")
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            command, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


HANGING = """
import sys, time
from exporter import __main__ as program

class Hangs:
    def __init__(self, _settings):
        pass
    async def start(self):
        pass
    def collect(self):
        time.sleep(300)
    async def aclose(self):
        pass

program.COLLECTORS = dict.fromkeys(program.COLLECTORS, Hangs)
sys.exit(program.main(sys.argv[1:]))
"""


def test_a_collector_that_hangs_holds_up_no_stop(tmp_path: Path) -> None:
    """As in a read of a file system that is gone: a restart waited for systemd's SIGKILL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-c", HANGING, f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_until(lambda: "is healthy" in page(f"{url}/-/healthy"))
        ask = urllib.request.Request(f"{url}/metrics")  # noqa: S310 - our own URL
        ask.add_header("X-Prometheus-Scrape-Timeout-Seconds", "1")
        with urllib.request.urlopen(ask, timeout=20) as answer:  # noqa: S310
            assert b"upkeep_build_info" in answer.read()
        process.terminate()
        assert process.wait(20) == 0
        assert "ends while a collector hangs" in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
