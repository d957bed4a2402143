"""The table of hazards and the tests belong together."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_hazard_has_tests_that_exist() -> None:
    source = "\n".join(p.read_text() for p in Path(__file__).parent.glob("*.py"))
    defined = set(re.findall(r"def (test_\w+)", source))
    rows = (ROOT / "docs/hazards/engine.md").read_text().splitlines()
    ids = []
    for row in rows:
        if not (found := re.match(r"\| (E\d+) \|", row)):
            continue
        ids.append(found[1])
        named = re.findall(r"`(test_\w+)(…?)`", row)
        assert named, row
        for name, more in named:
            hits = [d for d in defined if d == name or (more and d.startswith(name))]
            assert hits, f"{found[1]}: no test {name}"
    assert ids[:17] == [f"E{n}" for n in range(1, 18)]
