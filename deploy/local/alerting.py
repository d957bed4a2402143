"""The shipped rules and configurations of alerts/, made ready for local ports and a patience.

What runs locally is what is shipped: the files are read, and only addresses and waits replaced.
Rules keep their names, expressions, labels and order; only `for:` can get shorter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ALERTS = Path(__file__).resolve().parents[2] / "alerts"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long the parts wait, in seconds; None keeps what is shipped."""

    scrape: float | None = None
    """Prometheus' scrape and evaluation interval."""
    rule_for: float | None = None
    """The longest `for:` of a rule; shorter ones stay."""
    group_wait: float | None = None
    group_interval: float | None = None
    """Alertmanager: how soon a change of a group, or a failed notification, is sent again."""
    repeat_interval: float | None = None
    """Alertmanager: how soon an unchanged group is offered again."""

    def sentence(self) -> str:
        """What differs from the shipped files, for people; empty where nothing does."""
        parts = [
            f"{name} {value:g} s"
            for name, value in (
                ("scrape and evaluation every", self.scrape),
                ("each rule's `for:` at most", self.rule_for),
                ("group_wait", self.group_wait),
                ("group_interval", self.group_interval),
                ("repeat_interval", self.repeat_interval),
            )
            if value is not None
        ]
        return ", ".join(parts)


SHIPPED = Timing()
QUICK = Timing(scrape=1, rule_for=3, group_wait=1, group_interval=5)
"""For tests and the demo: minutes become seconds, everything else stays."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """host:port of each part; where there are several remediators or exporters, of each."""

    exporters: Sequence[str]
    remediators: Sequence[str]
    alertmanagers: Sequence[str]


def write_rules(directory: Path, timing: Timing) -> None:
    """Write every shipped rules file into `directory`, with `for:` shortened."""
    for source in sorted(ALERTS.glob("*.rules.yaml")):
        document = yaml.safe_load(source.read_text())
        for group in document["groups"]:
            for rule in group["rules"]:
                if timing.rule_for is not None and "for" in rule:
                    rule["for"] = _duration(min(timing.rule_for, seconds(rule["for"])))
        (directory / source.name).write_text(yaml.safe_dump(document, sort_keys=False))


def prometheus_configuration(
    addresses: Addresses, timing: Timing, *, token_file: Path | None = None
) -> str:
    """alerts/prometheus.yml for these addresses; the rules are looked for beside it.

    token_file: what the remediator's bearer token is read from; None sends no credentials.
    """
    document = yaml.safe_load((ALERTS / "prometheus.yml").read_text())
    if timing.scrape is not None:
        document["global"]["scrape_interval"] = _duration(timing.scrape)
        document["global"]["evaluation_interval"] = _duration(timing.scrape)
    targets = {
        "upkeep-exporter": addresses.exporters,
        "upkeep-remediator": addresses.remediators,
        "alertmanager": addresses.alertmanagers,
    }
    for job in document["scrape_configs"]:
        job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
        if token_file is not None and job["job_name"] == "upkeep-remediator":
            job["authorization"] = {"credentials_file": str(token_file)}
        if timing.scrape is not None and "scrape_timeout" in job:
            # Prometheus refuses a timeout longer than the interval.
            limit = min(seconds(job["scrape_timeout"]), timing.scrape)
            job["scrape_timeout"] = _duration(limit)
    document["alerting"]["alertmanagers"] = [
        {"static_configs": [{"targets": list(addresses.alertmanagers)}]}
    ]
    return yaml.safe_dump(document, sort_keys=False)


def alertmanager_configuration(
    webhook: str, timing: Timing, *, token_file: Path | None = None, people: str = ""
) -> str:
    """alerts/alertmanager.yml with this webhook, and people who read a webhook or nothing.

    token_file: what the bearer token is read from; None sends no credentials.
    people: URL of a webhook that stands for the people; empty: that receiver sends nothing.
    """
    document = yaml.safe_load((ALERTS / "alertmanager.yml").read_text())
    for receiver in document["receivers"]:
        if receiver["name"] == "upkeep-remediator":
            (hook,) = receiver["webhook_configs"]
            hook["url"] = webhook
            if token_file is None:
                del hook["http_config"]
            else:
                hook["http_config"]["authorization"]["credentials_file"] = str(token_file)
        else:
            receiver.pop("email_configs")
            if people:
                receiver["webhook_configs"] = [{"url": people, "send_resolved": True}]
    _shorten(document["route"], timing)
    return yaml.safe_dump(document, sort_keys=False)


def _shorten(route: dict[str, Any], timing: Timing) -> None:
    for name in ("group_wait", "group_interval", "repeat_interval"):
        value = getattr(timing, name)
        if value is not None and name in route:
            route[name] = _duration(min(value, seconds(route[name])))
    for child in route.get("routes", ()):
        _shorten(child, timing)


def seconds(duration: str) -> float:
    """A Prometheus duration of one unit (`90s`, `5m`, `4h`, `500ms`) in seconds."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0)):
        number = duration.removesuffix(unit)
        if number.isdigit():
            return int(number) * factor
    raise ValueError(f"{duration!r} is not a duration of one unit, such as 30s or 5m")


def _duration(value: float) -> str:
    return f"{round(value * 1000)}ms"
