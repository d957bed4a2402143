"""The shipped Alertmanager route, as the real amtool reads it."""

import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.local.alerting import (
    ALERTS,
    QUICK,
    SHIPPED,
    Timing,
    alertmanager_configuration,
    seconds,
)
from deploy.local.debian import binary
from tests.alerts.test_rules import FOR_PEOPLE, REMEDIABLE, RULES

ROUTE = ALERTS / "alertmanager.yml"


def receivers(configuration: Path, labels: dict[str, str]) -> list[str]:
    """Who gets an alert with these labels, in order."""
    done = subprocess.run(
        [
            str(binary("amtool")), "config", "routes", "test",
            f"--config.file={configuration}",
            *(f"{name}={value}" for name, value in labels.items()),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip().split(",")


@pytest.mark.debian
@pytest.mark.parametrize("name", sorted(RULES))
def test_a_remediable_alert_reaches_the_remediator_and_people(name: str) -> None:
    labels = {"alertname": name, "node": "n1", "namespace": "shop", **RULES[name]["labels"]}
    expected = ["upkeep-remediator", "people"] if name in REMEDIABLE else ["people"]
    assert receivers(ROUTE, labels) == expected


def test_every_alert_is_either_remediable_or_for_people() -> None:
    assert not set(REMEDIABLE) & FOR_PEOPLE


def test_the_remediator_stands_first_and_people_beside_it() -> None:
    first, second = yaml.safe_load(ROUTE.read_text())["route"]["routes"]
    assert first["receiver"] == "upkeep-remediator"
    assert first["continue"] is True
    assert second == {"receiver": "people"}


def test_a_group_is_one_fix_on_one_target_and_waits_as_the_contract_says() -> None:
    first = yaml.safe_load(ROUTE.read_text())["route"]["routes"][0]
    assert first["group_by"] == [
        "remediation", "cluster", "node", "namespace", "pod", "container", "deployment"
    ]  # fmt: skip
    assert seconds(first["group_wait"]) < 10
    assert seconds(first["group_interval"]) == 60
    assert seconds(first["repeat_interval"]) == 900


def test_the_webhook_hides_nothing_and_shows_who_it_is() -> None:
    receiver = yaml.safe_load(ROUTE.read_text())["receivers"][0]
    (hook,) = receiver["webhook_configs"]
    assert receiver["name"] == "upkeep-remediator"
    assert hook["send_resolved"] is True
    assert hook["max_alerts"] == 0
    assert hook["http_config"]["authorization"]["type"] == "Bearer"


def test_nothing_is_ever_kept_from_the_remediator() -> None:
    """An inhibited alert reaches nobody, so none with the label may be a target."""
    for rule in yaml.safe_load(ROUTE.read_text())["inhibit_rules"]:
        assert 'remediation = ""' in rule["target_matchers"]


@pytest.mark.debian
@pytest.mark.parametrize("timing", [SHIPPED, QUICK], ids=["shipped", "quick"])
@pytest.mark.parametrize("token", [True, False])
def test_the_local_rendering_routes_the_same(timing: Timing, token: bool, tmp_path: Path) -> None:
    rendered = tmp_path / "alertmanager.yml"
    rendered.write_text(
        alertmanager_configuration(
            "http://127.0.0.1:1/webhook",
            timing,
            token_file=tmp_path / "token" if token else None,
            people="http://127.0.0.1:2/",
        )
    )
    subprocess.run([str(binary("amtool")), "check-config", str(rendered)], check=True)
    assert receivers(rendered, {"remediation": "reap-zombies"}) == ["upkeep-remediator", "people"]
    assert receivers(rendered, {"alertname": "UpkeepPidsLow"}) == ["people"]
