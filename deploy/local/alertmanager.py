"""Debian's Alertmanager, run without being installed.

Debian's build reads its notification templates from /usr/share/prometheus/alertmanager and doesn't
start without them. To put them there would change the machine, and a mount namespace needs rights
that a user may not have. So a copy of the program has that one path replaced by another name of the
same length for "the current folder", and is started in the unpacked folder. Nothing else differs.
"""

import os
import tempfile
from pathlib import Path

from deploy.local.cache import Progress, print_progress
from deploy.local.debian import DebianError, binary

_INSTALLED = Path("/usr/share/prometheus/alertmanager")
_HERE = b"/proc/self/cwd"


def alertmanager_command(*, progress: Progress = print_progress) -> list[str]:
    """What to start Alertmanager with; its flags follow. Paths in them must be absolute.

    Raises DebianError as `binary` does, or where Debian's build is another than expected.
    """
    program = binary("prometheus-alertmanager", progress=progress)
    if (_INSTALLED / "default.tmpl").exists():
        return [str(program)]
    templates = program.parents[2] / _INSTALLED.relative_to("/")
    if not (templates / "default.tmpl").exists():
        return [str(program)]  # a build that carries its templates
    relocated = program.with_name("prometheus-alertmanager-relocated")
    if not relocated.exists():
        _write(relocated, _relocate(program.read_bytes()))
    return ["env", f"--chdir={templates}", str(relocated)]


def _relocate(program: bytes) -> bytes:
    installed = os.fsencode(_INSTALLED)
    padding = len(installed) - len(_HERE)
    here = _HERE + b"/." * (padding // 2) + b"/" * (padding % 2)
    if program.count(installed) == 0:
        raise DebianError(
            f"prometheus-alertmanager doesn't name {_INSTALLED}: this Debian release differs; "
            "as root, apt-get install prometheus-alertmanager"
        )
    return program.replace(installed, here)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also when two processes write it at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
        new.write(content)
    Path(new.name).chmod(0o755)
    Path(new.name).rename(path)
