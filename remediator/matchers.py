"""Matchers that map other people's alerts to fixes, written as Alertmanager writes them."""

import json
import re
from collections.abc import Mapping

import msgspec

_MATCHER = re.compile(
    r'\s*(?P<name>[a-zA-Z_][a-zA-Z0-9_]*)\s*(?P<operator>=~|!~|!=|=)\s*(?P<value>"(?:[^"\\]|\\.)*"|[^\s"]*)\s*'
)


# A group that repeats and holds a repetition: Python may try for ever, Alertmanager never does.
_NESTED = re.compile(r"\((?:[^()\\]|\\.)*[*+}](?:[^()\\]|\\.)*\)[*+{]")
_LONGEST = 1024  # characters of a value that is compared with a pattern
_PARTS = ("node", "namespace", "pod", "container", "deployment", "cluster")


class Matcher(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Alerts that match all of `match` ask for `fix`."""

    fix: str
    match: tuple[str, ...]
    """Such as `alertname="HostZombies"` or `cluster=~"prod-.*"`; =, !=, =~, !~, whole values."""
    labels: dict[str, str] = {}
    """Which of the alert's labels names each part of the target: `{pod: kube_pod}`."""

    def __post_init__(self) -> None:
        """Bad matchers are refused where the configuration is read, with the line."""
        if not self.match:
            raise ValueError("a matcher without `match` would take every alert")
        for text in self.match:
            _parse(text)
        if unknown := sorted(self.labels.keys() - set(_PARTS)):
            raise ValueError(
                f"labels: {unknown[0]!r} is no part of a target; those are {', '.join(_PARTS)}"
            )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an alert with these labels asks for `fix`. A missing label is an empty one."""
        for text in self.match:
            name, operator, value = _parse(text)
            given = labels.get(name, "")
            if "~" in operator and len(given) > _LONGEST:
                return False
            hit = re.fullmatch(value, given) is not None if "~" in operator else given == value
            if hit != (operator[0] == "="):
                return False
        return True

    def target_labels(self, labels: Mapping[str, str]) -> dict[str, str]:
        """The labels under the names that Upkeep's own alerts have.

        What is mapped is taken from nowhere else: an alert's own `pod` may be the exporter's.
        """
        renamed = {ours: labels.get(theirs, "") for ours, theirs in self.labels.items()}
        return {**labels, **renamed}


def _parse(text: str) -> tuple[str, str, str]:
    found = _MATCHER.fullmatch(text)
    if found is None:
        raise ValueError(f'{text!r} is not a matcher such as alertname="HostZombies"')
    value = found["value"]
    if value.startswith('"'):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(
                f"{text}: the quoted value can't be read; a backslash is written twice"
            ) from None
    if "~" in found["operator"]:
        if _NESTED.search(value):
            raise ValueError(f"{text!r}: a repetition of a repetition may take for ever; undo one")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{text!r}: not a regular expression: {error}") from None
    return found["name"], found["operator"], value
