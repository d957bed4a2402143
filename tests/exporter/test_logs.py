"""Log lines stay one line each, whatever a process or a label is named (E16)."""

import json
import subprocess
import sys

import pytest

_HOSTILE = "a\nlevel=error event=forged \x1b[31m\u202e\udc80"
_PROGRAM = """
import sys
from exporter import logs
logs.configure(level="info", format=sys.argv[1])
log = logs.get_logger("t")
log.info("seen", name="a\\nlevel=error event=forged \\x1b[31m\\u202e\\udc80", raw=b"\\x1b", n=3)
log.debug("not shown")
import logging
logging.getLogger("library").warning("from %s", "\\x1b]0;title\\x07")
"""


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_e16_hostile_names_are_inert_in_logs(form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, form], capture_output=True, check=True, text=True
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert "not shown" not in done.stderr
    if form == "json":
        first = json.loads(lines[0])
        assert first["event"] == "seen"
        assert first["n"] == 3
        assert first["name"] == _HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b").replace(
            "\u202e", "\\u202e"
        ).replace("\udc80", "\\udc80")
        assert json.loads(lines[1])["level"] == "warning"
    else:
        assert " level=info " in lines[0]
        assert "event=seen" in lines[0]


_FAILS = r"""
import sys
from exporter import logs
logs.configure(level="info", format=sys.argv[1])
try:
    raise ValueError("a process named \x1b[31m\u202e\u2028\rlevel=error event=forged")
except ValueError:
    logs.get_logger("t").exception("failed")
"""


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_e16_what_an_exception_quotes_is_inert_too(form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FAILS, form], capture_output=True, check=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert line.isprintable()
    assert r"Traceback (most recent call last):\n" in line
    if form == "json":
        assert all(part.isprintable() for part in json.loads(line)["exception"].split("\n"))
