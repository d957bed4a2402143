"""`make run` as a person meets it: a process, what it prints, and what is left when it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.observe import alerts, get_json, get_text
from deploy.local.run import ROOT

pytestmark = pytest.mark.debian


class Run:
    """The process, and its lines so far."""

    def __init__(self, state: Path, log: Path, **environment: str) -> None:
        code = "import sys; from pathlib import Path; from deploy.local.run import main\n"
        code += f"sys.exit(main(Path({str(state)!r})))"
        self.state = state
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str, within: float = 120) -> re.Match[str]:
        """Until its output matches."""
        deadline = time.monotonic() + within
        while not (found := re.search(pattern, self.text)):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.2)
        return found

    def children(self) -> list[int]:
        """Its programs."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home without a kubeconfig."""
    return tmp_path


@pytest.fixture
def running(home: Path, tmp_path: Path) -> Iterator[Run]:
    cache = os.environ.get("UPKEEP_CACHE") or str(Path.home() / ".cache/upkeep")
    gone = str(home / "gone")  # of a cluster that was taken away
    run = Run(
        tmp_path / "state", tmp_path / "output", HOME=str(home), UPKEEP_CACHE=cache, KUBECONFIG=gone
    )
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()


def gone(pids: list[int], within: float = 30) -> bool:
    """Whether none of them is left, zombies of a dead parent aside."""
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_shows_where_everything_is_and_what_it_found(running: Run) -> None:
    running.wait_for("watching; one line for each event")
    urls = dict(re.findall(r"^  (\w+) +(http://127\.0\.0\.1:\d+)$", running.text, re.MULTILINE))
    assert list(urls) == ["exporter", "remediator", "prometheus", "alertmanager"]
    assert "Dry run: nothing on this machine is changed" in running.text
    for condition in ("certificates", "zombies", "rollouts"):
        assert re.search(rf"^  {condition}: ", running.text, re.MULTILINE)
    assert "rollouts: off, as there is no kubeconfig" in running.text
    assert "<title>" in get_text(urls["remediator"]) or "<h1" in get_text(urls["remediator"])
    assert get_json(f"{urls['remediator']}/api/v1/remediations") == []
    status = get_json(f"{urls['alertmanager']}/api/v2/status")
    assert "upkeep-remediator" in status["config"]["original"]
    assert not [a for a in alerts(urls["prometheus"]) if a.state == "firing"]

    children = running.children()
    assert len(children) == 4
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(90) == 0
    assert f"stopped; what it wrote is in {running.state}/run" in running.text
    assert gone(children)


def test_nothing_outlives_it_even_killed(running: Run) -> None:
    running.wait_for("watching; one line for each event")
    children = running.children()
    running.process.kill()
    running.process.wait()
    assert gone(children)


def test_a_program_that_dies_ends_the_run_with_its_last_words(running: Run) -> None:
    running.wait_for("watching; one line for each event")
    children = running.children()
    for pid in children:
        if b"alertmanager" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    assert running.process.wait(60) == 1
    assert "alertmanager ended by itself; the end of" in running.text
    assert gone(children)


def test_a_second_one_in_the_same_checkout_says_so(running: Run, tmp_path: Path) -> None:
    running.wait_for("watching; one line for each event")
    second = Run(running.state, tmp_path / "second")
    assert second.process.wait(60) == 1
    assert "runs already in this checkout; end it first" in second.text
    assert running.process.poll() is None


def test_its_programs_write_nowhere_but_in_its_folder(running: Run) -> None:
    running.wait_for("watching; one line for each event")
    written = {path for pid in running.children() for path in open_for_writing(pid)}
    assert running.state / "run/journal.sqlite" in written
    assert {path for path in written if not path.is_relative_to(running.state)} == set()


def open_for_writing(pid: int) -> Iterator[Path]:
    """Regular files that a process has open for writing, deleted ones aside."""
    for descriptor in Path(f"/proc/{pid}/fdinfo").iterdir():
        flags = int(re.findall(r"^flags:\s+(\d+)", descriptor.read_text(), re.MULTILINE)[0], 8)
        path = Path(f"/proc/{pid}/fd/{descriptor.name}").readlink()
        if flags & (os.O_WRONLY | os.O_RDWR) and path.is_file():
            yield path
