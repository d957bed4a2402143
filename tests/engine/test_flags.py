"""The remediator's flags: their environment twins, and one sentence that names what is wrong."""

import argparse
from pathlib import Path

import pytest

from exporter.flags import environment_name
from remediator import flags

# What is asked for once, on a command line, has no twin: it would answer for the next one too.
ASKED_ONCE = {
    *("help", "force", "scheduled", "namespace", "pod", "container", "deployment"),
    *("fix", "phase", "target", "limit", "output", "why"),
}


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [a.choices for a in flags.parser({})._actions if isinstance(a.choices, dict)]
    return found


def test_defaults_are_the_contract() -> None:
    given, settings = flags.read(["serve"], {})
    assert given.command == "serve"
    assert settings.listen == ("", 9791)
    assert settings.journal == Path("/var/lib/upkeep/remediator.db")
    assert (settings.config_file, settings.web_config_file) == (None, None)
    assert (settings.dry_run, settings.cluster, settings.kubeconfig) == (False, "", None)
    assert (settings.rootfs, settings.procfs) == (Path("/"), Path("/proc"))
    assert settings.cgroupfs == Path("/sys/fs/cgroup")
    assert settings.lock_directory == Path("/run/upkeep")
    assert (settings.log_level, settings.log_format) == ("info", "logfmt")
    assert settings.node_name == settings.node_name.lower() != ""


def test_every_flag_has_an_environment_twin_and_the_flag_wins(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    environ = {
        "UPKEEP_WEB_LISTEN_ADDRESS": "127.0.0.1:1234",
        "UPKEEP_WEB_CONFIG_FILE": "web.yml",
        "UPKEEP_CONFIG_FILE": "r.yml",
        "UPKEEP_JOURNAL": "/j.db",
        "UPKEEP_DRY_RUN": "true",
        "UPKEEP_NODE_NAME": "n1",
        "UPKEEP_CLUSTER": "c1",
        "UPKEEP_KUBECONFIG": "/k",
        "UPKEEP_PATH_ROOTFS": str(tmp_path),
        "UPKEEP_PATH_PROCFS": f"{tmp_path}/proc",
        "UPKEEP_PATH_CGROUPFS": "/host/cgroup",
        "UPKEEP_PATH_LOCKS": "/host/run",
        "UPKEEP_LOG_LEVEL": "debug",
        "UPKEEP_LOG_FORMAT": "json",
    }
    _, settings = flags.read(["serve", "--node-name=n2", "--cluster", "c2"], environ)
    assert settings == flags.Flags(
        listen=("127.0.0.1", 1234),
        web_config_file=Path("web.yml"),
        config_file=Path("r.yml"),
        journal=Path("/j.db"),
        dry_run=True,
        node_name="n2",
        cluster="c2",
        kubeconfig=Path("/k"),
        rootfs=tmp_path,
        procfs=tmp_path / "proc",
        cgroupfs=Path("/host/cgroup"),
        lock_directory=Path("/host/run"),
        log_level="debug",
        log_format="json",
    )
    assert flags.read(["serve", "--no-dry-run"], environ)[1].dry_run is False
    assert flags.parser({}).variables == set(environ)


@pytest.mark.parametrize("command", sorted(commands()))
def test_only_what_is_asked_once_has_no_twin(command: str) -> None:
    twins = flags.parser({}).variables
    for action in commands()[command]._actions:
        names = [o.removeprefix("--") for o in action.option_strings if o.startswith("--")]
        if names:
            assert (environment_name(names[0]) in twins) != (names[0] in ASKED_ONCE), names


@pytest.mark.parametrize("command", ["serve", "run reap-zombies", "pause", "check-config"])
@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("UPKEEP_DRYRUN", "UPKEEP_DRY_RUN"),
        ("UPKEEP_CONFIGFILE", "UPKEEP_CONFIG_FILE"),
        ("UPKEEP_DRY", "UPKEEP_DRY_RUN"),
    ],
)
def test_an_unknown_variable_is_refused(
    command: str, variable: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was meant to forbid something, perhaps: a dry run that isn't one acts."""
    with pytest.raises(SystemExit) as stopped:
        flags.read(command.split(), {variable: "true"})
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"the variable {variable} is not known; did you mean {meant}?" in said
    assert said.count("\n") == 1


def test_variables_of_others_are_let_be() -> None:
    environ = {
        "UPKEEP_ZOMBIES_MIN_AGE": "30s",  # the exporter's, in a file that both read
        "UPKEEP_COLLECTOR_ROLLOUTS": "false",
        "UPKEEP_CACHE": "/c",
        "UPKEEP_SEED": "1",
        "UPKEEP_SOAK": "1",
        "UPKEEP_SERVICE_HOST": "10.0.0.1",
        "UPKEEP_REMEDIATOR_SERVICE_PORT_WEBHOOK": "9791",
        "UPKEEP_REMEDIATOR_PORT": "tcp://10.0.0.1:9791",
        "UPKEEP_REMEDIATOR_PORT_9791_TCP_ADDR": "10.0.0.1",
    }
    assert flags.read(["serve"], environ)[1] == flags.read(["serve"], {})[1]


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["serve", "--dryrun"], {}, "unknown flag or argument: --dryrun"),
        (["serve"], {"UPKEEP_DRY_RUN": "maybe"}, "UPKEEP_DRY_RUN='maybe' is neither true nor fals"),
        (["serve", "--web.listen-address=9791"], {}, "'9791' is not host:port or :port"),
        (["serve", "--node-name=Node-1"], {}, "'Node-1' is no node's name: they are lower case"),
        (["serve", "--journal=kubernetes"], {}, "cluster mode is not built yet"),
        (["list"], {"UPKEEP_JOURNAL": "kubernetes"}, "cluster mode is not built yet"),
        (["list", "--limit=0"], {}, "'0' is not a number above 0"),
        (["serve", "--node-name="], {}, "'' is no node's name: they are lower case"),
        (["serve", "--path.rootfs="], {}, "--path.rootfs: it is empty; name a path"),
        (["serve", "--path.rootfs=/none"], {}, "--path.rootfs=/none is not a directory; name the"),
        (["run", "a"], {"UPKEEP_PATH_PROCFS": "/none"}, "--path.procfs=/none is not a directory"),
        (["list", "--journal="], {}, "--journal: it is empty; name a path"),
        (["serve", "--config.file="], {}, "--config.file: it is empty; name a path"),
        (["controller"], {}, "invalid choice: 'controller'"),
        ([], {}, "COMMAND"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_it(
    arguments: list[str],
    environ: dict[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        flags.read(arguments, environ)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
