"""The configuration file: strict, with the line and the remedy of whatever is wrong."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remediator import config
from remediator.config import ConfigError, Mode, Seconds
from remediator.fixes import settings_types
from remediator.matchers import Matcher
from remediator.yaml_source import Source

FIXES = settings_types()


def parse(text: str) -> config.Config:
    return config.parse(Source(text, "r.yml"), FIXES)[0]


def test_an_empty_file_is_the_defaults() -> None:
    found = parse("")
    assert found.fixes["rotate-certificates"].pause_after_failure
    assert found.fixes["reap-zombies"].cooldown == Seconds(300)


def test_options_are_read() -> None:
    found = parse(
        "fixes:\n"
        "  reap-zombies:\n"
        "    mode: approval\n"
        "    cooldown: 15m\n"
        "    maintenance_windows:\n"
        "      - {start: '22:00', end: '04:00', days: [fri], timezone: Europe/Berlin}\n"
        "    settings: {act_at: 7}\n"
        "opt_out: {namespaces: [kube-*]}\n"
        "matchers:\n"
        "  - {fix: reap-zombies, match: ['alertname=\"HostZombies\"'], labels: {pod: kube_pod}}\n"
    )
    zombies = found.fixes["reap-zombies"]
    assert (zombies.mode, zombies.cooldown) == (Mode.APPROVAL, Seconds(900))
    assert zombies.max_acts == 30  # the default of this fix stays
    assert found.matchers[0].matches({"alertname": "HostZombies"})


def test_off_needs_no_quotes() -> None:
    """YAML reads it as false."""
    assert parse("fixes: {reap-zombies: {mode: off}}").fixes["reap-zombies"].mode is Mode.OFF


def test_a_label_that_is_mapped_is_taken_from_nowhere_else() -> None:
    """Without it the alert's own `pod`, which is kube-state-metrics', would be the target."""
    matcher = Matcher(fix="reap-zombies", match=("a=b",), labels={"pod": "kube_pod"})
    assert matcher.target_labels({"pod": "metrics-1", "kube_pod": "web-1"})["pod"] == "web-1"
    assert matcher.target_labels({"pod": "metrics-1", "node": "n1"}) == {"pod": "", "node": "n1"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fixes:\n  reap-zombies:\n    cooldwn: 5m\n", ("r.yml:3", "cooldwn", "cooldown")),
        ("fixes:\n  reap-zombis: {}\n", ("r.yml:2", "reap-zombis", "reap-zombies")),
        ("fixes:\n  reap-zombies:\n\n    cooldown: soon\n", ("r.yml:4", "cooldown", "30s")),
        ("fixes:\n  reap-zombies:\n    mode: yes\n", ("r.yml:3", "mode")),
        ("fixes:\n  reap-zombies:\n    max_acts: 0\n", ("r.yml:2", "max_acts", "off")),
        ("fixes:\n  reap-zombies:\n    settings:\n      act_att: 1\n", ("r.yml:4", "act_att")),
        (
            "fixes: {reap-zombies: {maintenance_windows:\n\n\n [{start: '25:00', end: '01:00'}]}}",
            ("r.yml:4", "23:59"),
        ),
        ("matchers:\n  - fix: nope\n    match: [a=b]\n", ("r.yml:2", "no such fix")),
        ("matchers:\n  - fix: reap-zombies\n    match: ['a=~\"(\"']\n", ("r.yml:2", "regular")),
        ("opt_out:\n  nodes: n1\n", ("r.yml:2", "nodes", "array")),
        ("a: 1\na: 2\n", ("r.yml:2", "twice")),
        ("fixes:\n\treap: 1\n", ("r.yml:2", "not YAML")),
        ("- 1\n", ("r.yml:1", "options are wanted")),
        ("journal:\n  max_age: 1h\n", ("r.yml:2", "forget")),
        ("journal:\n  max_active: 0\n", ("r.yml:1", "max_active")),
        ("journal:\n  max_bytes: 5\n", ("r.yml:1", "max_bytes")),
        ("fixes:\n  reap-zombies:\n    expires: 99999999d\n", ("r.yml:3", "ten years")),
        ("fixes: {reap-zombies: {cooldown: true}}\n", ("r.yml:1", "cooldown")),
        ("a: &a [*a]\n", ("r.yml",)),
        ("fixes: !!python/object:os.system {}\n", ("r.yml",)),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    said = str(raised.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yml can't be read"):
        config.load(tmp_path / "none.yml", FIXES)
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(tmp_path / "binary.yml", FIXES)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abfixes:-{}[],&*!?|>'\"# \n\t0123", max_size=60))
def test_any_text_is_a_configuration_or_one_sentence(text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        assert str(error)


def test_every_option_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "remediator.md").read_text()
    for struct in (
        config.Config,
        config.FixPolicy,
        config.OptOut,
        config.JournalOptions,
        config.WebhookOptions,
    ):
        for name in struct.__struct_fields__:
            assert f"`{name}`" in page, name
