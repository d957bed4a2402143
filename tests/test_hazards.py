"""The tables of hazards and the tests belong together, in all four domains."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# Those of the catalogue; what was found later follows on.
DOMAINS = {
    "zombies": ("Z", 18),
    "rollouts": ("R", 17),
    "certificates": ("C", 20),
    "engine": ("E", 17),
}


def defined(domain: str) -> dict[str, set[str]]:
    """The test functions of each file of a domain."""
    function = re.compile(r"^ *(?:async )?def (test_\w+)", re.MULTILINE)
    paths = (TESTS / domain).glob("*.py")
    return {path.name: set(function.findall(path.read_text())) for path in paths}


def rows(domain: str) -> dict[str, str]:
    """The cell that names the tests, by hazard."""
    text = (ROOT / "docs/hazards" / f"{domain}.md").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| [A-Z]\d+ \|", line)]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [len(row) for row in cells] == [4] * len(cells)
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0]: row[-1] for row in cells}


def ids(test: str) -> set[str]:
    """`test_c5_c7_…` is a test of both."""
    leading = re.match(r"test_((?:[a-z]\d+_)+)", test)
    return {part.upper() for part in leading[1].split("_") if part} if leading else set()


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_hazard_has_a_row_and_a_test_of_its_name(domain: str) -> None:
    letter, most = DOMAINS[domain]
    wanted = {f"{letter}{number}" for number in range(1, most + 1)}
    tested = set[str]().union(*[ids(t) for tests in defined(domain).values() for t in tests])
    assert wanted - set(rows(domain)) == set()
    assert wanted - tested == set()
    assert {one for one in tested if one[0] == letter} - set(rows(domain)) == set()


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_test_that_a_row_names_exists(domain: str) -> None:
    files = defined(domain)
    for hazard, cell in rows(domain).items():
        named = [n for n in re.findall(r"`([^`]+)`", cell) if "test_" in n]
        assert named, hazard
        for name in named:
            file, _, test = name.rpartition("::") if "::" in name else ("", "", name)
            if name.endswith(".py"):
                file, test = name.rsplit("/", 1)[-1], "test_…"
            places = [files.get(file, set())] if file else list(files.values())
            begins = test.removesuffix("…")
            hits = {
                t
                for tests in places
                for t in tests
                if t == test or (begins != test and t.startswith(begins))
            }
            assert hits, f"{hazard}: no test {name}"
