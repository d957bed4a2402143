"""The shipped rules: promtool's own tests, and what ties them to contract, runbooks and waits."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.local import check_alerts
from deploy.local.alerting import ALERTS, seconds
from deploy.local.debian import binary
from tests.alerts.contract import FIXES, strangers

RUNBOOKS = ALERTS.parent / "docs/runbooks"
RUNBOOK_URL = "https://upkeep.dev/runbooks/"
REMEDIABLE = {
    "UpkeepCertificateExpiring": "rotate-certificates",
    "UpkeepZombieProcesses": "reap-zombies",
    "UpkeepZombieFlood": "reap-zombies",
    "UpkeepRolloutStuck": "unstick-rollout",
}
FOR_PEOPLE = {
    "UpkeepCertificateExpiringSoon",
    "UpkeepCertificateExpiringUnmanaged",
    "UpkeepCertificateNotReloaded",
    "UpkeepPidsLow",
    "UpkeepRolloutBlocked",
    "UpkeepRemediationFailed",
    "UpkeepRemediationPaused",
    "UpkeepRemediationPending",
    "UpkeepRemediatorDown",
    "UpkeepAgentMissing",
    "UpkeepWebhookFailing",
    "UpkeepCollectorFailing",
    "UpkeepExporterDown",
}


def rules() -> dict[str, dict[str, Any]]:
    """Every shipped rule by its name; a name twice is an error."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(ALERTS.glob("*.rules.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                assert rule["alert"] not in found
                found[rule["alert"]] = rule
    return found


RULES = rules()
every_rule = pytest.mark.parametrize("name", RULES)


@pytest.mark.debian
def test_promtool_and_amtool_find_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_alerts.main() == 0
    assert capsys.readouterr().out.count(": ok\n") == 4


def test_every_alert_of_the_contract_is_there_and_no_other() -> None:
    assert set(RULES) == set(REMEDIABLE) | FOR_PEOPLE


@every_rule
def test_only_what_a_fix_can_heal_asks_for_one(name: str) -> None:
    assert RULES[name]["labels"].get("remediation") == REMEDIABLE.get(name)
    assert set(REMEDIABLE.values()) == set(FIXES)
    assert RULES[name]["labels"]["severity"] in ("info", "warning", "critical")


@every_rule
def test_an_expression_names_only_what_the_contract_has(name: str) -> None:
    assert strangers(RULES[name]["expr"]) == []


def test_a_stranger_is_seen() -> None:
    assert strangers(
        'sum by (pot) (upkeep_zombie_processes{pod="a", pot="b"}) > upkeep_zombies'
    ) == [
        "label pot of upkeep_zombie_processes",
        "metric upkeep_zombies",
        "grouping by pot",
    ]


@every_rule
def test_the_runbook_exists_and_says_what_it_must(name: str) -> None:
    url = RULES[name]["annotations"]["runbook_url"]
    assert url == RUNBOOK_URL + name
    page = (RUNBOOKS / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    for heading in ("What it means.", "What Upkeep does by itself.", "What to do by hand."):
        assert f"**{heading}**" in page
    assert f"({name}.md)" in (RUNBOOKS / "README.md").read_text()


def test_no_runbook_without_its_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"} == set(RULES)


@every_rule
def test_the_index_of_runbooks_says_who_is_asked(name: str) -> None:
    row = re.search(rf"^\| {name} \| (.*?) \|", (RUNBOOKS / "README.md").read_text(), re.MULTILINE)
    assert row is not None
    assert row[1].startswith(f"`{REMEDIABLE[name]}`" if name in REMEDIABLE else "people")


@pytest.mark.debian
@pytest.mark.parametrize("step", [-15, 15], ids=["an evaluation earlier", "an evaluation later"])
@every_rule
def test_the_rule_tests_pin_every_wait(name: str, step: int, tmp_path: Path) -> None:
    """Moving any `for:` by one evaluation makes promtool's tests fail: they look just before it
    and at it."""
    if "for" not in RULES[name]:
        # It fires at once; giving it a wait must be noticed too.
        if step < 0:
            return
        changed = f"{step}s"
    else:
        changed = f"{seconds(RULES[name]['for']) + step:.0f}s"
    shutil.copytree(ALERTS, tmp_path / "alerts")
    (source,) = (
        path
        for path in (tmp_path / "alerts").glob("*.rules.yaml")
        if f"{name}\n" in path.read_text()
    )
    document = yaml.safe_load(source.read_text())
    for group in document["groups"]:
        for rule in group["rules"]:
            if rule["alert"] == name:
                rule["for"] = changed
    source.write_text(yaml.safe_dump(document))
    tests = source.parent / "tests" / source.name.replace(".rules.", ".test.")
    done = subprocess.run(
        [str(binary("promtool")), "test", "rules", tests.name],
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, f"no test notices {name} with for: {changed}"
    assert name in done.stdout + done.stderr


def flags(command: Sequence[str]) -> set[str]:
    """The flags in a command line."""
    return {word for word in command if word.startswith("--")}


def commands() -> set[tuple[str, ...]]:
    """Every command line of the remediator that a runbook tells people to type."""
    pages = "\n".join(path.read_text() for path in RUNBOOKS.glob("*.md"))
    typed = re.findall(r"(?:    |`)upkeep-remediator ([^`\n]+)", pages)
    return {tuple(line.split()) for line in typed}


def test_the_runbooks_name_commands() -> None:
    named = {command[0] for command in commands()}
    assert {"list", "show", "run", "resume", "approve", "check-config"} <= named


@pytest.mark.parametrize("command", sorted({(c[0], *sorted(flags(c))) for c in commands()}))
def test_a_command_of_the_runbooks_exists_with_its_flags(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "remediator", command[0], "--help"],
        cwd=ALERTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {flag for flag in command[1:] if flag not in done.stdout} == set()


def test_the_table_of_alerts_says_what_the_rules_say() -> None:
    table = (ALERTS.parent / "docs/alerts.md").read_text()
    rows = re.findall(r"^\| (Upkeep\w+) \|.*\| *([^|]*?) *\| ([^|]+) \|$", table, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(RULES)
    for name, wait, asks in rows:
        assert wait.replace(" ", "") == RULES[name].get("for", ""), name
        assert asks == (f"`{REMEDIABLE[name]}`" if name in REMEDIABLE else "people"), name
