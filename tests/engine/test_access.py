"""What access to an API server there is, is known and said at the start, not at the first alert."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from remediator import flags
from remediator.config import ConfigError, Mode
from remediator.daemon import load_config
from remediator.fixes import FIXES
from tests.engine.support import ROOT, killed_while_acting
from tests.exporter.test_main import CONFIG

ENFORCE = "fixes:\n  unstick-rollout:\n    mode: {}\n"


def remediator(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """One command; of this test's own environment nothing names a cluster."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("UPKEEP_", "KUBE"))}
    return subprocess.run(
        [sys.executable, "-m", "remediator", *arguments],
        cwd=ROOT,
        env={**bare, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def rollout_mode(config: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Mode:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    _, settings = flags.read(["check-config", f"--config.file={config}"], environ)
    return load_config(settings, FIXES)[0].fixes["unstick-rollout"].mode


@pytest.mark.parametrize("environ", [{"UPKEEP_KUBECONFIG": "/k"}, {"KUBECONFIG": "/k:/l"}])
@pytest.mark.parametrize("mode", ["enforce", "dry-run", "off"])
def test_with_access_the_mode_is_what_it_says(
    tmp_path: Path, mode: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "r.yml"
    config.write_text(ENFORCE.format(mode))
    assert rollout_mode(config, environ, monkeypatch) is Mode(mode)
    config.write_text("")
    assert rollout_mode(config, environ, monkeypatch) is Mode.ENFORCE


@pytest.mark.parametrize("mode", ["enforce", "dry-run", "approval"])
def test_without_access_only_the_default_is_off(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "r.yml"
    config.write_text("")
    assert rollout_mode(config, {}, monkeypatch) is Mode.OFF
    config.write_text(ENFORCE.format("off"))
    assert rollout_mode(config, {}, monkeypatch) is Mode.OFF
    config.write_text(ENFORCE.format(mode))
    with pytest.raises(ConfigError, match=r"r\.yml:3: .*mode: .* give --kubeconfig FILE"):
        rollout_mode(config, {}, monkeypatch)
    # By hand another fix works all the same: the variable stands in the unit's file, perhaps.
    _, settings = flags.read(["run", "rotate-certificates", f"--config.file={config}"], {})
    load_config(settings, FIXES, only="rotate-certificates")


def test_check_config_says_what_will_be_done(tmp_path: Path) -> None:
    config, access = tmp_path / "r.yml", tmp_path / "kubeconfig"
    config.write_text(ENFORCE.format("enforce"))
    access.write_text(CONFIG)
    check = ("check-config", f"--config.file={config}")
    for done in (
        remediator(*check, f"--kubeconfig={access}"),
        remediator(*check, UPKEEP_KUBECONFIG=str(access)),
        remediator(*check, KUBECONFIG=str(access)),
    ):
        assert (done.returncode, done.stderr) == (0, "")
        assert "unstick-rollout: enforce" in done.stdout
    refused = remediator(*check)
    assert refused.returncode == 1
    assert "give --kubeconfig FILE (or set KUBECONFIG)" in refused.stderr
    access.unlink()
    refused = remediator(*check, f"--kubeconfig={access}")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert f"can't read {access} (No such file or directory)" in refused.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't read {} (No such file or directory) for kubeconfig"),
        ("clusters: [", "kubeconfig {} is not YAML, line 1; write it anew"),
    ],
)
def test_it_does_not_start_with_a_kubeconfig_that_cannot_be_read(
    tmp_path: Path, content: str | None, said: str
) -> None:
    access, journal = tmp_path / "kubeconfig", tmp_path / "j.db"
    if content is not None:
        access.write_text(content)
    listen = ("--web.listen-address=127.0.0.1:0", f"--path.locks={tmp_path}")
    done = remediator("serve", f"--kubeconfig={access}", f"--journal={journal}", *listen)
    assert done.returncode == 2
    assert said.format(access) in done.stderr
    assert (done.stderr + done.stdout).count("\n") == 1


async def test_what_was_begun_is_finished_even_so(tmp_path: Path) -> None:
    """A rotation killed half-way may have left the kubeconfig broken, and mends it."""
    daemon = await killed_while_acting(tmp_path)
    daemon._flags = (f"--kubeconfig={tmp_path / 'none'}",)
    daemon.start()
    await daemon.ready()
    (found,) = await daemon.settled()
    assert (found["phase"], found["message"]) == ("Succeeded", "finished after a crash")
    assert daemon.stop() == 0
    assert daemon.log().count("what was begun has to be finished") == 1
    daemon.start()  # now that nothing is left to do
    assert daemon.process is not None
    assert daemon.process.wait(60) == 2
