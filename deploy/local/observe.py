"""What the running stack shows of itself: Prometheus' alerts and series, the remediator's records.

`make run`, `make demo` and the end-to-end tests look through the same public pages that an operator
has, never into the programs.
"""

import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any


class UnreachableError(RuntimeError):
    """A page gave no answer that can be used; the sentence names it."""


@dataclass(frozen=True)
class Alert:
    """An alert as Prometheus holds it."""

    labels: tuple[tuple[str, str], ...]
    """Sorted; with alertname, severity and, where a fix is asked for, remediation."""
    state: str
    """pending or firing."""
    summary: str

    @property
    def name(self) -> str:
        return self["alertname"]

    def __getitem__(self, label: str) -> str:
        return dict(self.labels).get(label, "")


@dataclass(frozen=True)
class Remediation:
    """One record of the remediator's JSON API."""

    id: str
    fix: str
    target: str
    phase: str
    reason: str
    message: str
    steps: tuple[str, ...]
    """What each step did and how it came out, oldest first; empty in a list of records."""
    count: int


def get_text(url: str, token: str = "") -> str:
    """The text that `url` answers; `UnreachableError` where it doesn't."""
    request = urllib.request.Request(url)  # noqa: S310 - our own http
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - our own http
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace").strip()
        raise UnreachableError(f"{url} answered {error.code}: {said}") from None
    except (OSError, HTTPException) as error:
        raise UnreachableError(f"{url} gave no answer: {error}") from None


def get_json(url: str, token: str = "") -> Any:
    """The JSON that `url` answers; `UnreachableError` where it doesn't."""
    text = get_text(url, token)
    try:
        return json.loads(text)
    except ValueError:
        raise UnreachableError(f"{url} answered something else than JSON: {text[:200]}") from None


def query(prometheus: str, expression: str) -> list[tuple[dict[str, str], float]]:
    """Labels and value of each series that the expression gives now."""
    parameters = urllib.parse.urlencode({"query": expression})
    answer = get_json(f"{prometheus}/api/v1/query?{parameters}")
    data = answer["data"]
    if data["resultType"] == "scalar":
        return [({}, float(data["result"][1]))]
    return [(series["metric"], float(series["value"][1])) for series in data["result"]]


def alerts(prometheus: str) -> list[Alert]:
    """Every pending or firing alert."""
    return [
        Alert(
            labels=tuple(sorted(alert["labels"].items())),
            state=alert["state"],
            summary=alert["annotations"].get("summary", ""),
        )
        for alert in get_json(f"{prometheus}/api/v1/alerts")["data"]["alerts"]
    ]


def remediations(remediator: str, token: str = "", **filters: str) -> list[Remediation]:
    """The remediator's records, newest first."""
    parameters = f"?{urllib.parse.urlencode(filters)}" if filters else ""
    return [
        _remediation(record)
        for record in get_json(f"{remediator}/api/v1/remediations{parameters}", token)
    ]


def remediation(remediator: str, identity: str, token: str = "") -> Remediation:
    """One record, with its steps, which the list leaves out."""
    return _remediation(get_json(f"{remediator}/api/v1/remediations/{identity}", token))


def _remediation(record: dict[str, Any]) -> Remediation:
    return Remediation(
        id=record["id"],
        fix=record["fix"],
        target=_target(record["target"]),
        phase=record["phase"],
        reason=record["reason"],
        message=record["message"],
        steps=tuple(_step(step) for step in record.get("steps", ())),
        count=record["count"],
    )


def _step(step: dict[str, Any]) -> str:
    message = str(step["message"]).rstrip(".")
    return f"{message}: {step['result']}" if step.get("result") else message


def _target(target: dict[str, str]) -> str:
    if target.get("deployment"):
        return f"{target['namespace']}/{target['deployment']}"
    if target.get("pod"):
        return f"{target['namespace']}/{target['pod']} {target['container']}"
    return target.get("node", "")
