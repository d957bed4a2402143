"""The systemd units, read by systemd itself, which needs no running systemd for that."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.local.debian import require_installed, unpack
from remediator.flags import read

_UNITS = Path(__file__).resolve().parent.parent.parent / "deploy" / "systemd"


def _verify(folder: Path) -> list[str]:
    """What `systemd-analyze verify` has to say of the units in `folder`, in lines."""
    require_installed("libsystemd-shared")  # a library, where systemd itself is only unpacked
    program = unpack("systemd") / "usr/bin/systemd-analyze"
    done = subprocess.run(
        [program, "verify", *sorted(folder.glob("*.service")), *sorted(folder.glob("*.timer"))],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.splitlines()


def _units() -> list[Path]:
    return sorted(path for path in _UNITS.iterdir() if path.suffix in (".service", ".timer"))


def test_what_the_units_start_is_a_command_line_that_parses() -> None:
    started = [
        line.removeprefix("ExecStart=/opt/upkeep/bin/upkeep-remediator ")
        for unit in _units()
        for line in unit.read_text().splitlines()
        if line.startswith("ExecStart=/opt/upkeep/bin/upkeep-remediator ")
    ]
    assert len(started) == 2
    commands = {line: read(line.split(), {})[0].command for line in started}
    assert sorted(commands.values()) == ["run", "serve"]


def _settings(name: str) -> dict[str, str]:
    """One unit's settings; of one that stands there twice, the last."""
    lines = (_UNITS / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")


@pytest.mark.parametrize("name", ["upkeep-remediator", "upkeep-rotate-certificates"])
def test_e50_a_stop_never_ends_a_kubeadm_half_way(name: str) -> None:
    """`mixed` sends SIGKILL to the children as soon as the remediator has ended, whatever is left
    of TimeoutStopSec, and the kernel's end of a child would stop all of the unit."""
    settings = _settings(f"{name}.service")
    assert (settings["KillMode"], settings["OOMPolicy"]) == ("process", "continue")


def test_e51_a_node_that_was_off_looks_soon_after_boot() -> None:
    """A missed OnCalendar waits for the random delay as well: up to six hours without an API."""
    settings = _settings("upkeep-rotate-certificates-boot.timer")
    assert settings["Unit"] == "upkeep-rotate-certificates.service"
    assert settings["OnBootSec"] == "10min"
    assert "RandomizedDelaySec" not in settings
    enabled = re.search(r"systemctl enable --now (.*\.timer)\n", (_UNITS / "README.md").read_text())
    timers = {path.name for path in _units() if path.suffix == ".timer"}
    assert enabled is not None
    assert set(enabled[1].split()) == timers


def test_the_pages_that_the_units_name_are_installed() -> None:
    steps = (_UNITS / "README.md").read_text()
    made = re.findall(r"^ +install .* -t (\S+) docs/\*\.md ", steps, re.MULTILINE)
    pages = [
        Path(line.removeprefix("Documentation=file://"))
        for unit in _units()
        for line in unit.read_text().splitlines()
        if line.startswith("Documentation=")
    ]
    assert len(pages) > 1
    for page in pages:
        assert [str(page.parent)] == made
        assert (_UNITS.parent.parent / "docs" / page.name).is_file()


@pytest.mark.root
@pytest.mark.debian
def test_systemd_knows_every_setting_of_the_units(tmp_path: Path) -> None:
    for unit in _units():
        # /opt/upkeep is made by whoever installs; a program that is there stands in for it.
        text = unit.read_text().replace("/opt/upkeep/bin/upkeep-", f"{tmp_path}/upkeep-")
        (tmp_path / unit.name).write_text(text)
    for name in ("upkeep-exporter", "upkeep-remediator"):
        shutil.copy("/bin/true", tmp_path / name)
    assert _verify(tmp_path) == []
    broken = (tmp_path / "upkeep-exporter.service").read_text()
    (tmp_path / "upkeep-exporter.service").write_text(
        broken.replace("ProtectSystem=strict", "ProtectSystem=very")
    )
    assert any("parse protect system" in line for line in _verify(tmp_path))
    timer = tmp_path / "upkeep-rotate-certificates.timer"
    timer.write_text(timer.read_text().replace("OnCalendar=daily", "OnCalendar=dayly"))
    assert any("calendar" in line for line in _verify(tmp_path))
