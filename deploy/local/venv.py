"""Makes the virtual environment of a checkout, from the lock file and with hashes checked.

It runs under the machine's own Python, before anything is installed: the standard library alone,
and nothing that an older Python couldn't parse, so that it can say what is too old.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main(folder: Path) -> None:
    """Make `folder` a virtual environment with everything pinned; exits with the remedy if not."""
    if sys.version_info < (3, 11):  # noqa: UP036 - that's the point
        version = sys.version.split()[0]
        sys.exit(
            f"Upkeep needs Python 3.11 or newer, this is {version}; try make PYTHON=python3.12"
        )
    say(f"setting up {folder} (once; about a minute)")
    python = folder / "bin" / "python"
    if not python.exists():
        make(folder)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    pinned = [*pip, "--require-hashes", "-r", str(ROOT / "requirements-dev.txt")]
    itself = [*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    if run(pinned) or run(itself):
        sys.exit("pip could not install what Upkeep needs; its own message stands above")


def make(folder: Path) -> None:
    """Run `python -m venv`; Debian splits `ensurepip` off, so as root its package is installed."""
    command = [sys.executable, "-m", "venv", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)
    if subprocess.run(command, check=False, capture_output=True).returncode == 0:
        return
    shutil.rmtree(folder, ignore_errors=True)
    package = f"python3.{sys.version_info[1]}-venv"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit(f"Python's venv module is missing; as root: apt-get install {package}")
    say(f"installing Debian's package {package}")
    run(["apt-get", "update", "-qq"])
    if run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]):
        sys.exit(f"could not install {package}; apt's own message stands above")
    if run(command):
        sys.exit("python -m venv failed; its own message stands above")


def run(command: "list[str]") -> int:
    """Run a command with what it prints on standard error; returns its exit status."""
    return subprocess.run(command, check=False, stdout=sys.stderr).returncode


def say(text: str) -> None:
    print("upkeep: " + text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
