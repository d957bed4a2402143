"""Flags: their environment twins, and one sentence that names what is wrong."""

from pathlib import Path

import pytest

from exporter import config
from exporter.flags import duration, listen_address


def test_defaults_are_the_contract() -> None:
    settings, warnings = config.parse([], {})
    assert settings.listen == ("", 9790)
    assert settings.collectors == ("certificates", "zombies", "rollouts")
    assert settings.zombies_min_age == 30
    assert settings.rollouts_selector == "akash.network/manifest-service"
    assert (settings.procfs, settings.rootfs) == (Path("/proc"), Path("/"))
    assert warnings == []


def test_every_flag_has_an_environment_twin_and_the_flag_wins(tmp_path: Path) -> None:
    environ = {
        "UPKEEP_WEB_LISTEN_ADDRESS": "127.0.0.1:1234",
        "UPKEEP_WEB_CONFIG_FILE": "web.yml",
        "UPKEEP_COLLECTOR_ROLLOUTS": "false",
        "UPKEEP_PATH_PROCFS": str(tmp_path),
        "UPKEEP_PATH_ROOTFS": str(tmp_path),
        "UPKEEP_PATH_CGROUPFS": str(tmp_path),
        "UPKEEP_CERTIFICATES_PATH": "/a/*.crt,/b/*.conf",
        "UPKEEP_CERTIFICATES_ENDPOINT": "127.0.0.1:6443,[::1]:2379",
        "UPKEEP_ZOMBIES_MIN_AGE": "2m",
        "UPKEEP_ROLLOUTS_SELECTOR": "a=b",
        "UPKEEP_KUBECONFIG": "/k",
        "UPKEEP_NODE_NAME": "n1",
        "UPKEEP_LOG_LEVEL": "debug",
        "UPKEEP_LOG_FORMAT": "json",
    }
    settings, _ = config.parse(["--node-name", "n2", "--certificates.path", "/c"], environ)
    assert settings.listen == ("127.0.0.1", 1234)
    assert settings.collectors == ("certificates", "zombies")
    assert settings.procfs == settings.rootfs == settings.cgroupfs == tmp_path
    assert settings.certificate_paths == ("/c",)
    assert settings.certificate_endpoints == ("127.0.0.1:6443", "[::1]:2379")
    assert settings.zombies_min_age == 120
    assert settings.rollouts_selector == "a=b"
    assert (settings.kubeconfig, settings.web_config_file) == (Path("/k"), Path("web.yml"))
    assert settings.node_name == "n2"
    assert (settings.log_level, settings.log_format) == ("debug", "json")


def test_the_help_shows_defaults_as_they_are_given() -> None:
    said = " ".join(config.parser({}).format_help().split())
    assert "[UPKEEP_WEB_LISTEN_ADDRESS, default :9790]" in said
    assert "[UPKEEP_PATH_PROCFS, default /proc]" in said
    assert "[UPKEEP_KUBECONFIG]" in said


def test_repeated_flags_add_up() -> None:
    settings, _ = config.parse(["--certificates.path=/a", "--certificates.path=/b"], {})
    assert settings.certificate_paths == ("/a", "/b")


@pytest.mark.parametrize("how", [["--rollouts.selector="], []])
def test_an_empty_selector_means_every_deployment(how: list[str]) -> None:
    environ = {} if how else {"UPKEEP_ROLLOUTS_SELECTOR": ""}
    assert config.parse(how, environ)[0].rollouts_selector == ""


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--zombies.min-agee=3"], {}, "unknown flag or argument: --zombies.min-agee=3"),
        (["--zombies.min-age=soon"], {}, "'soon' is not a duration such as 30s, 5m, 2h or 14d"),
        ([], {"UPKEEP_ZOMBIES_MIN_AGE": "soon"}, "UPKEEP_ZOMBIES_MIN_AGE='soon' can't be used"),
        ([], {"UPKEEP_COLLECTOR_ZOMBIES": "maybe"}, "neither true nor false"),
        (["--web.listen-address=9790"], {}, "'9790' is not host:port or :port"),
        (["--path.procfs=/nonexistent"], {}, "--path.procfs=/nonexistent is not a directory"),
        (["--path.rootfs="], {}, "--path.rootfs: it is empty; name a path, or leave the flag out"),
        (["--kubeconfig", ""], {}, "--kubeconfig: it is empty; name a path"),
        (["--node-name=Node-1"], {}, "'Node-1' is no node's name: they are lower case"),
        (["--zombies.min-age=999999d"], {}, "is longer than a hundred years"),
        (["--log.level=loud"], {}, "invalid choice: 'loud'"),
        ([], {"UPKEEP_LOG_FORMAT": "xml"}, "UPKEEP_LOG_FORMAT='xml' is not one of logfmt, json"),
        (
            ["--no-collector.certificates", "--no-collector.zombies", "--no-collector.rollouts"],
            {},
            "every collector is turned off",
        ),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_it(
    arguments: list[str],
    environ: dict[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        config.parse(arguments, environ)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_misspelt_variable_is_said_but_kubernetes_own_are_not() -> None:
    environ = {
        "UPKEEP_ZOMBIE_MIN_AGE": "5",
        "UPKEEP_EXPORTER_SERVICE_HOST": "10.0.0.1",
        "UPKEEP_EXPORTER_PORT_9790_TCP": "tcp://10.0.0.1:9790",
    }
    _, warnings = config.parse([], environ)
    assert warnings == [
        "the variable UPKEEP_ZOMBIE_MIN_AGE is not known; did you mean UPKEEP_ZOMBIES_MIN_AGE?"
    ]


def test_durations_and_addresses() -> None:
    assert [duration(t) for t in ("30", "1.5s", "5m", "2h", "14d")] == [30, 1.5, 300, 7200, 1209600]
    assert listen_address("[::1]:80") == ("::1", 80)
    for text in ("", "s", "1e3", "nan", "-1", "٣s"):
        with pytest.raises(Exception, match="is not a duration"):
            duration(text)
