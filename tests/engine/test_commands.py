"""The commands for people: what is asked for is done or refused in a sentence, never half."""

import contextlib
import getpass
import json
import os
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest

from remediator import cli, flags
from remediator.cli import command
from tests.engine.mend_file import FIXES
from tests.engine.support import NODE, Daemon

TWO = {"one": FIXES["mend-file"], "two": FIXES["mend-file"]}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """One remediation in the journal, and no daemon."""
    made = Daemon(tmp_path_factory.mktemp("host"))
    made.break_("web-1")
    done = made.cli("run", "mend-file", "--pod=web-1")
    assert done.returncode == 0, done.stderr
    return made


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Standard output is a pipe that nobody reads, as after `| head` has ended."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as pipe, contextlib.redirect_stdout(pipe):
        yield


async def asked(host: Daemon, *arguments: str) -> int:
    given, settings = flags.read([*arguments, f"--journal={host.journal}"], {})
    return await command(given, settings, TWO)


async def test_e54_a_pause_is_whole_though_nobody_reads_what_it_says(host: Daemon) -> None:
    with unread():
        assert await asked(host, "pause", "--why=a look") == 0
    listed = host.cli("list").stdout
    assert "one is paused" in listed
    assert "two is paused" in listed


@pytest.mark.parametrize("what", [["list"], ["list", "-o", "json"], ["show", "hand-"]])
async def test_nobody_reading_on_is_no_error(host: Daemon, what: list[str]) -> None:
    with unread():
        assert await asked(host, *what) == 0


@pytest.mark.parametrize("name", ["show", "approve"])
def test_e54_an_empty_id_is_not_the_only_one_there_is(host: Daemon, name: str) -> None:
    """`approve "$ID"` with nothing in it."""
    done = host.cli(name, "")
    assert (done.returncode, done.stdout) == (2, "")
    assert "it is empty; `list` shows the ids" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["show", "none"], 1, "no remediation, or more than one, begins with 'none'"),
        (["approve", "hand-"], 1, "is Succeeded (Mended)"),
        (["list", "--fix=mend-fil"], 1, "no such fix: mend-fil; known: mend-file"),
        (["list", f"--limit={'9' * 20}"], 2, "is not a number above 0, of 9 digits"),
        (["list", "--journal=/none/j.db"], 1, "there is no journal at /none/j.db yet"),
        (["check-config", "--config.file=/"], 1, "/ can't be read: Is a directory"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    host: Daemon, arguments: list[str], status: int, said: str
) -> None:
    done = host.cli(*arguments)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (status, 1, "")
    assert said in done.stderr


@pytest.mark.parametrize("name", ["list", "pause"])
async def test_another_user_is_told_who_may(
    host: Daemon, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)  # as of a folder of mode 0700
    assert await asked(host, name) == 1
    said = capsys.readouterr().err
    assert said == f"upkeep-remediator: this user may not use {host.journal}; try it as root\n"


async def test_a_user_without_a_name_may_pause(
    host: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unnamed() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr(getpass, "getuser", unnamed)
    assert await asked(host, "resume") == 0
    assert await asked(host, "pause", "one") == 0
    assert f"by uid {os.getuid()}: by hand" in host.cli("list").stdout
    assert cli._person() == f"uid {os.getuid()}"


def test_check_config_reads_what_serve_would_refuse(tmp_path: Path) -> None:
    host, web = Daemon(tmp_path), tmp_path / "web.yml"
    hashed = bcrypt.hashpw(b"x", bcrypt.gensalt(4)).decode()
    web.write_text(f"basic_auth_users: {{ada: {hashed}}}\n")
    check = ("check-config", f"--web.config.file={web}")
    assert host.cli(*check).returncode == 0
    web.write_text("\nbasic_auth_user: {}\n")
    refused = host.cli(*check)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"{web}:2: basic_auth_user: no such option" in refused.stderr
    host.write_config({"webhook": {"bearer_token_file": str(tmp_path / "none")}})
    refused = host.cli("check-config")
    assert refused.returncode == 1
    assert f"{tmp_path / 'none'} can't be read" in refused.stderr


def test_json_stands_alone_on_standard_output(tmp_path: Path) -> None:
    host = Daemon(tmp_path)
    host.break_("web-2")
    done = host.cli("run", "mend-file", "--pod=web-2", "-o", "json")
    assert json.loads(done.stdout)["target"]["node"] == NODE
    assert "mend: remove the file of web-2" in done.stderr
