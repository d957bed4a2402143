"""What the programs can say stands in the pages that people read: reasons, flags, metrics."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from exporter.flags import environment_name
from remediator import flags
from remediator.fixes.certificates import RotateCertificates
from remediator.fixes.rollouts import UnstickRollout
from remediator.fixes.zombies import ReapZombies
from remediator.model import Phase
from remediator.policy import REFUSALS
from remediator.worker import FAILURES
from tests.alerts.contract import EXPORTER, REMEDIATOR

ROOT = Path(__file__).resolve().parent.parent

NOT_BUILT = {"upkeep_agent_last_seen_timestamp_seconds"}
"""Of cluster mode; the contract has its name already."""

FIXES: Mapping[str, Mapping[Phase, tuple[str, ...]]] = {
    "certificates": RotateCertificates.reasons,
    "zombies": ReapZombies.reasons,
    "rollouts": UnstickRollout.reasons,
}
# What ends a remediation takes its code as the first argument, or as `reason=`.
ENDS = {"RefusedError", "FixError", "GaveUpError", "Refusal", "Outcome"}
ENGINE = {"_refuse", "_admit", "_failed", "Decision", "Outcome"}


def in_backquotes(page: str) -> set[str]:
    return set(re.findall(r"`([^`\s]+)`", (ROOT / page).read_text()))


def codes(paths: Iterable[Path], ends: set[str]) -> Iterator[tuple[str, str]]:
    """(code, where) for each that is written out in a call of one of `ends`."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            given = [k.value for k in node.keywords if k.arg == "reason"] + node.args[:1]
            if isinstance(node.func, ast.Attribute) and node.func.attr == "_end":
                name, given = next(iter(ends)), node.args[2:3]
            for value in given if name in ends else ():
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value, f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize("condition", FIXES)
def test_every_reason_of_a_fix_is_known_and_documented(condition: str) -> None:
    declared = {reason for reasons in FIXES[condition].values() for reason in reasons}
    paths = [*(ROOT / "remediator/fixes" / condition).glob("*.py")]
    paths += (ROOT / "exporter/checks").glob("freeing.py") if condition == "rollouts" else ()
    written = dict(codes(paths, ENDS))
    assert len(written) > 3
    assert {code: at for code, at in written.items() if code not in declared} == {}
    assert declared - in_backquotes(f"docs/{condition}.md") == set()


def test_every_reason_of_the_engine_is_documented() -> None:
    written = dict(codes((ROOT / "remediator").glob("*.py"), ENGINE))
    assert {"Cooldown", "NeedsApproval", "Locked", "VerifyFailed"} <= set(written)
    said = in_backquotes("docs/remediator.md")
    assert {code: at for code, at in written.items() if code not in said} == {}
    assert {*REFUSALS, *FAILURES} - said == set()


def test_every_flag_of_serve_is_documented() -> None:
    said = in_backquotes("docs/remediator.md")
    names = {word for word in said if word.startswith("--")}
    assert flags.parser({}).variables - {environment_name(n.removeprefix("--")) for n in names} == (
        set()
    )


def test_the_readme_has_every_metric_and_no_other() -> None:
    said = {word for word in in_backquotes("README.md") if re.fullmatch(r"upkeep_\w+", word)}
    known = {re.sub(r"_(bucket|sum|count)$", "", name) for name in EXPORTER | REMEDIATOR}
    assert said == known - NOT_BUILT
