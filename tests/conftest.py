"""What every test shares: the seed of sampled suites, and an honest word about what is left out.

A test that needs root or Debian is marked so. Where the machine lacks it the test is skipped and
the last lines of the run say which and why; under CI=true nothing may be left out, so there a skip
of any kind is a failure.
"""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.apt import codename

pytest_plugins = ["tests.cluster.fixtures"]

SEED = int(os.environ.get("UPKEEP_SEED") or random.SystemRandom().randrange(2**32))
os.environ["UPKEEP_SEED"] = str(SEED)  # for the workers, which would each draw their own
SOAK = os.environ.get("UPKEEP_SOAK") == "1"
_CI = os.environ.get("CI") == "true"


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Print the seed, so that a failure of a sampled suite can be had again."""
    extent = "in full (UPKEEP_SOAK=1)" if SOAK else "sampled"
    return [f"upkeep: long suites run {extent}; seed {SEED} (again with UPKEEP_SEED={SEED})"]


def _lacking(item: pytest.Item) -> str:
    names = {mark.name for mark in item.iter_markers()}
    if "root" in names and os.geteuid() != 0:
        return "needs root; run `sudo make test`"
    if "debian" in names and not codename():
        return "needs the packages of Debian or Ubuntu; run it on such a machine"
    if "cluster" in names and not (codename() == "bookworm" or "KUBEBUILDER_ASSETS" in os.environ):
        return "needs Kubernetes from Debian 12's source package, or $KUBEBUILDER_ASSETS"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, in words, what this machine can't run; CI fails on it instead (see below)."""
    for item in items:
        if why := _lacking(item):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Under CI a skipped test is a failed one: a green run means that everything ran."""
    report = yield
    if _CI and report.skipped:  # type: ignore[attr-defined]
        report.outcome = "failed"  # type: ignore[attr-defined]
        report.longrepr = f"left out, which CI does not allow: {report.longrepr}"  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out and why, last, where it's read."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[why] = reasons.get(why, 0) + 1
    for why, count in sorted(reasons.items()):
        terminalreporter.write_line(f"left out: {count} tests: {why}", yellow=True)


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of this run's sampled suites (printed in the header)."""
    return SEED


@pytest.fixture(scope="session")
def soak() -> bool:
    """True where the long suites are to run in full."""
    return SOAK


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter: every start of a pytest closes its own to them."""
    with tempfile.TemporaryDirectory(prefix="upkeep-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
