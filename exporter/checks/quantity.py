"""Kubernetes quantities as the scheduler counts them.

The scheduler compares integers: millicores for cpu, whole units for everything else, each rounded
up. A fit test that rounds otherwise disagrees with it at the edge, which is where stuck rollouts
live.
"""

import re
from fractions import Fraction
from functools import lru_cache

_QUANTITY = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:([eE][+-]?[0-9]{1,3})|([numkMGTPE]|[KMGTPE]i)?)"
)
_SUFFIXES = {
    "": Fraction(1),
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 10**3),
    **{name: Fraction(1000) ** power for power, name in enumerate("kMGTPE", start=1)},
    **{name + "i": Fraction(1024) ** power for power, name in enumerate("KMGTPE", start=1)},
}


class QuantityError(ValueError):
    """The text is no Kubernetes quantity."""


def parse(text: str) -> Fraction:
    """The exact value of a quantity such as `250m`, `1.5Gi` or `1e3`.

    Raises `QuantityError` where it isn't one (apimachinery's `resource.Quantity` grammar).
    """
    match = _QUANTITY.fullmatch(text)
    if match is None or len(text) > 64:
        raise QuantityError(f"{text[:64]!r} is not a Kubernetes quantity")
    number, exponent, suffix = match.groups()
    if exponent is not None:
        return Fraction(number) * Fraction(10) ** int(exponent[1:])
    return Fraction(number) * _SUFFIXES[suffix or ""]


@lru_cache(maxsize=4096)
def amount(resource: str, text: str) -> int:
    """A resource's quantity in the scheduler's unit: millicores for cpu, else units, rounded up."""
    value = parse(text)
    if resource == "cpu":
        value *= 1000
    return -(-value.numerator // value.denominator)


def display(resource: str, units: int) -> str:
    """The amount for people: `250m` cpu, `3Gi` memory, `2` nvidia.com/gpu."""
    if resource == "cpu":
        return f"{units}m" if units % 1000 else str(units // 1000)
    if resource in {"memory", "ephemeral-storage"} or resource.startswith("hugepages-"):
        for suffix, size in (("Gi", 1024**3), ("Mi", 1024**2), ("Ki", 1024)):
            if abs(units) >= size:
                return f"{units / size:.4g}{suffix}"
    return str(units)
