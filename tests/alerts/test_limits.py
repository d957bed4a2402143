"""The remediator acts on whatever the shipped rules ask it to: its limits are no stricter.

Were they, an alert would fire, be refused as harmless, and fire for ever.
"""

import re

from deploy.local.alerting import seconds
from exporter.config import Config
from remediator.fixes import certificates, rollouts, zombies
from tests.alerts.test_rules import RULES


def threshold(rule: str, comparison: str) -> float:
    """The one number that the rule's expression compares with."""
    (found,) = re.findall(rf"{re.escape(comparison)}\s*(\d+(?:\.\d+)?)", RULES[rule]["expr"])
    return float(found)


def test_a_certificate_that_fires_is_due() -> None:
    limits = certificates.Settings()
    assert limits.act_below_days >= threshold("UpkeepCertificateExpiring", ") <=")
    (part,) = re.findall(r"\)\s*/\s*(\d+)", RULES["UpkeepCertificateExpiring"]["expr"])
    assert limits.act_below_fraction >= 1 / float(part)


def test_zombies_that_fire_are_enough_to_act_on() -> None:
    limits = zombies.Settings()
    assert limits.act_at <= threshold("UpkeepZombieProcesses", ">=")
    assert limits.flood_at <= threshold("UpkeepZombieFlood", ">=")


def test_zombies_that_the_exporter_counts_are_old_enough_for_the_fix() -> None:
    assert zombies.Settings().min_age <= Config().zombies_min_age


def test_scarce_process_slots_make_a_flood_where_people_are_told_of_them() -> None:
    limit = threshold("UpkeepPidsLow", ") <") * 100
    assert zombies.Settings().pids_left_percent >= limit


def test_a_rollout_that_fires_has_been_stuck_for_long_enough() -> None:
    assert rollouts.Settings().min_stuck <= seconds(RULES["UpkeepRolloutStuck"]["for"])


def test_a_rollout_that_fires_is_one_the_fix_looks_at() -> None:
    assert rollouts.Settings().selector == Config().rollouts_selector
