"""Label selectors as kubectl writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.checks.labels import Requirement, SelectorError, parse_selector

LABELS = {"app": "web", "tier": "front", "akash.network/manifest-service": "x"}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("app=web", True),
        ("app==web", True),
        ("app!=web", False),
        ("missing!=web", True),
        ("app in (web, api)", True),
        ("app notin (web)", False),
        ("missing notin (web)", True),
        ("akash.network/manifest-service", True),
        ("!app", False),
        ("!missing", True),
        ("app=web,tier in (front,back),!missing", True),
        ("app=web,tier=back", False),
    ],
)
def test_selectors(text: str, matches: bool) -> None:
    assert parse_selector(text).matches(LABELS) is matches


@pytest.mark.parametrize("text", ["app=", "a b", "=x", "app in web", "app in (a", "a=b,,c", "-a=b"])
def test_broken_ones_are_named_or_mean_the_empty_value(text: str) -> None:
    if text == "app=":  # kubectl takes this as "the label is there and empty"
        assert parse_selector(text).matches({"app": ""})
        return
    with pytest.raises(SelectorError, match="label condition"):
        parse_selector(text)


@pytest.mark.parametrize(
    ("operator", "value", "label", "matches"),
    [
        ("Gt", "4", "5", True),
        ("Gt", "5", "5", False),
        ("Lt", "10", "9", True),
        ("Gt", "4", "five", False),
        ("Gt", "4", "1_0", False),
        ("Gt", "x", "5", False),
        ("Sideways", "4", "5", False),
    ],
)
def test_comparisons(operator: str, value: str, label: str, matches: bool) -> None:
    requirement = Requirement("count", operator, (value,))
    assert requirement.matches({"count": label}) is matches
    assert not requirement.matches({})


@given(st.text(max_size=40))
def test_any_text_is_a_selector_or_named_as_none(text: str) -> None:
    try:
        parse_selector(text).matches(LABELS)
    except SelectorError as error:
        assert "kubectl -l" in str(error)
