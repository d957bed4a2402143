"""Label selectors: the `a=b,c in (d,e),!f` text of a flag and the structs inside objects.

Both end as the same requirements, so that a flag, a PodDisruptionBudget and an anti-affinity term
are matched by one piece of code.
"""

import re
from collections.abc import Mapping, Sequence

import msgspec

_NAME = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_KEY = rf"(?:{_NAME}/)?{_NAME}"
_VALUE = rf"(?:{_NAME})?"
_EXISTS = re.compile(rf"(!?)\s*({_KEY})")
_EQUALITY = re.compile(rf"({_KEY})\s*(==|=|!=)\s*({_VALUE})")
_SET = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")


class SelectorError(ValueError):
    """The text is no label selector."""


class Requirement(msgspec.Struct, frozen=True, rename="camel"):
    """One condition on a label, node field or taint key, as in `matchExpressions`."""

    key: str
    operator: str
    """In, NotIn, Exists, DoesNotExist; for node affinity Gt and Lt as well."""
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the labels satisfy it. An operator this doesn't know matches nothing."""
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value is not None and value in self.values
            case "NotIn":
                return value is None or value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None
            case "Gt" | "Lt":
                return self._compares(value)
        return False

    def _compares(self, value: str | None) -> bool:
        if value is None or len(self.values) != 1:
            return False
        try:
            have, want = _int64(value), _int64(self.values[0])
        except ValueError:
            return False
        return have > want if self.operator == "Gt" else have < want


def _int64(text: str) -> int:
    """Go's strconv.ParseInt: no spaces, no underscores, 64 bits."""
    if not re.fullmatch(r"[+-]?[0-9]+", text) or not -(2**63) <= int(text) < 2**63:
        raise ValueError(text)
    return int(text)


class LabelSelector(msgspec.Struct, frozen=True, rename="camel"):
    """`metav1.LabelSelector`; empty matches everything."""

    match_labels: dict[str, str] = {}
    match_expressions: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )


def parse_selector(text: str) -> LabelSelector:
    """Read a selector as kubectl's `-l` takes it; `SelectorError` where it isn't one."""
    requirements: list[Requirement] = []
    for part in _split(text):
        if found := _SET.fullmatch(part):
            values = tuple(value.strip() for value in found[3].split(","))
            operator = "In" if found[2] == "in" else "NotIn"
            requirements.append(Requirement(found[1], operator, values))
        elif found := _EQUALITY.fullmatch(part):
            operator = "NotIn" if found[2] == "!=" else "In"
            requirements.append(Requirement(found[1], operator, (found[3],)))
        elif found := _EXISTS.fullmatch(part):
            operator = "DoesNotExist" if found[1] else "Exists"
            requirements.append(Requirement(found[2], operator))
        else:
            raise SelectorError(
                f"{part!r} in the selector {text!r} is not a label condition; "
                "write it as for kubectl -l, such as app=web or akash.network/manifest-service"
            )
    return LabelSelector(match_expressions=tuple(requirements))


def _split(text: str) -> Sequence[str]:
    """Split at commas outside parentheses; empty text has no parts."""
    parts = [part.strip() for part in re.split(r",(?![^()]*\))", text)]
    return [] if parts == [""] else parts
