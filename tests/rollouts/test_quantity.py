"""Quantities against the rules of apimachinery, and against exact arithmetic."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.checks.quantity import QuantityError, amount, display, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", Fraction(0)),
        ("100m", Fraction(1, 10)),
        ("1.5Gi", Fraction(3 * 1024**3, 2)),
        ("1e3", Fraction(1000)),
        ("1E3", Fraction(1000)),
        ("12E", Fraction(12 * 10**18)),
        ("5Ei", Fraction(5 * 1024**6)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("-2k", Fraction(-2000)),
        ("3u", Fraction(3, 10**6)),
        ("1e-3", Fraction(1, 1000)),
    ],
)
def test_known_quantities(text: str, value: Fraction) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    "text", ["", "m", "1 Gi", "1gi", "0x1", "1e", "\uff11", "1_0", "NaN", "1ee3"]
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(QuantityError):
        parse(text)


@pytest.mark.parametrize(
    ("resource", "text", "units"),
    [("cpu", "1", 1000), ("cpu", "1u", 1), ("memory", "1500m", 2), ("nvidia.com/gpu", "2", 2)],
)
def test_amounts_round_up_as_the_scheduler_does(resource: str, text: str, units: int) -> None:
    assert amount(resource, text) == units


@given(st.integers(0, 10**6), st.sampled_from(["m", "", "k", "Ki", "Mi", "G"]))
def test_an_amount_is_never_less_than_the_quantity(number: int, suffix: str) -> None:
    text = f"{number}{suffix}"
    for resource, scale in (("cpu", 1000), ("memory", 1)):
        exact = parse(text) * scale
        assert exact <= amount(resource, text) < exact + 1


@pytest.mark.parametrize(
    ("resource", "units", "text"),
    [("cpu", 1500, "1500m"), ("cpu", 2000, "2"), ("memory", 3 * 1024**3, "3Gi"), ("pods", 3, "3")],
)
def test_amounts_for_people(resource: str, units: int, text: str) -> None:
    assert display(resource, units) == text
