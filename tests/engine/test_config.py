"""The configuration file: strict, with the line and the remedy of whatever is wrong."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.yaml_source import Source
from remediator import config
from remediator.config import ConfigError, Mode, Seconds
from remediator.fixes import settings_types
from remediator.matchers import Matcher

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
        (
            "fixes:\n reap-zombies:\n  maintenance_windows:\n   - {start: 22:00, end: 4:00}\n",
            ("r.yml:4", "start", "in quotes"),
        ),
        ("matchers:\n  - fix: nope\n    match: [a=b]\n", ("r.yml:2", "no such fix")),
        ("matchers:\n  - fix: reap-zombies\n    match: ['a=~\"(\"']\n", ("r.yml:2", "regular")),
        (
            "matchers:\n  - fix: reap-zombies\n    match: ['a=~\"b\\.c\"']\n",
            ("r.yml:2", "a backslash is written twice"),
        ),
        ("opt_out:\n  nodes: n1\n", ("r.yml:2", "nodes", "array")),
        ("a: 1\na: 2\n", ("r.yml:2", "twice")),
        ("fixes:\n\treap: 1\n", ("r.yml:2", "not YAML")),
        ("- 1\n", ("r.yml:1", "options are wanted")),
        ("journal:\n  max_age: 1h\n", ("r.yml:2", "forget")),
        ("journal:\n  max_active: 0\n", ("r.yml:2", "max_active")),
        ("fixes: {reap-zombies: {cooldown: true}}\n", ("r.yml:1", "cooldown")),
        ("a: &a [*a]\n", ("r.yml",)),
        ("fixes: !!python/object:os.system {}\n", ("r.yml",)),
        ("\nshutdown_grace: !!timestamp x\n", ("r.yml:2", "timestamp")),
        ("\nshutdown_grace: !!bool x\n", ("r.yml:2", "bool")),
        ("\nshutdown_grace: 2001-99-99\n", ("r.yml:2", "2001-99-99")),
        (f"\njournal:\n  max_bytes: {'9' * 5000}\n", ("r.yml:3", "max_bytes")),
        ('\nopt_out: {nodes: ["\\ud800"]}\n', ("r.yml:2", "nodes")),
        (f"shutdown_grace: {'9' * 400}\n", ("r.yml:1", "hundred years")),
        ("fixes: {reap-zombies: {expires: 99999999d}}\n", ("r.yml:1", "hundred years")),
        (f"fixes: {{reap-zombies: {{max_acts: {'9' * 40}}}}}\n", ("r.yml:1", "max_acts")),
        ("journal:\n  max_bytes: -1\n", ("r.yml:2", "max_bytes", "1048576")),
        ("journal:\n  max_active: 0\n", ("r.yml:2", "max_active")),
        ("journal:\n  max_records: 0\n", ("r.yml:2", "max_records")),
        ("webhook:\n  max_body_bytes: 0\n", ("r.yml:2", "max_body_bytes")),
        ("webhook:\n  max_connections: 0\n", ("r.yml:2", "max_connections")),
        ("webhook:\n  body_timeout: 0\n", ("r.yml:1", "body_timeout")),
        ("webhook:\n  max_bytes_in_flight: 1024\n", ("r.yml:1", "max_body_bytes")),
        (
            "matchers:\n  - {fix: reap-zombies, match: [a=b], labels: {podd: p}}\n",
            ("r.yml:2", "podd", "no part of a target", "pod,"),
        ),
        (
            "matchers:\n  - {fix: reap-zombies, match: ['a=~\"(a+)+$\"']}\n",
            ("r.yml:2", "repetition"),
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    said = str(raised.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ("pods: [web-1]", "namespace/pod"),
        ("pods: ['*web*']", "namespace/pod"),
        ("pods: [shop/web/1]", "namespace/pod"),
        ("deployments: [web]", "namespace/deployment"),
        ("namespaces: [shop/web]", "the name of a namespace"),
        ("nodes: [Node-1]", "the name of a node"),
        ("nodes: ['']", "the name of a node"),
        ("nodes: ['node-[0-9]']", "the name of a node"),
    ],
)
def test_e53_an_opt_out_that_would_match_nothing_is_refused(entry: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"r.yml:2: .*would match nothing; write {wanted}"):
        parse(f"\nopt_out: {{{entry}}}\n")


def test_e53_whatever_may_match_is_kept() -> None:
    entries = ("*", "*/*", "shop/*", "*/web-*", "kube-*/web.1")
    found = parse(f"opt_out: {{pods: {list(entries)}, nodes: ['*', n1.example.org]}}\n")
    assert found.opt_out.pods == entries


def test_a_few_aliases_do_not_make_much_of_little() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
        for old, new in pairwise("abcdefghijklmno")
    )
    with pytest.raises(ConfigError, match="write fewer aliases"):
        parse(bomb)


def test_a_pattern_is_compared_with_no_more_than_names_can_be() -> None:
    (matcher,) = parse("matchers: [{fix: reap-zombies, match: ['a!~\"b.*.*.*c\"']}]\n").matchers
    assert matcher.matches({"a": "x"})
    assert not matcher.matches({"a": "b" * 1_000_000})


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
