"""Builds the project's image with buildah, where no registry of images can be reached.

The Dockerfile takes its base by `ARG`; here the base is made from Debian's packages with
debootstrap, once, and kept in the cache. buildah gets storage of its own, so that nothing of the
machine's containers is touched. Needs root (debootstrap) and Debian.
"""

import os
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deploy.local import debian
from deploy.local.apt import codename, machine_sources
from deploy.local.cache import Progress, cache_directory, exclusive, print_progress

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGE = "localhost/upkeep:test"
_BASE = "localhost/upkeep-base:latest"


def build_image(archive: Path, *, progress: Progress = print_progress) -> Path:
    """Build the Dockerfile of this checkout; writes and returns a docker-archive tar.

    The tar's image is named `IMAGE`. Raises DebianError where a tool can't be had, RuntimeError
    with the build's last lines where it fails.
    """
    debian.require_installed("buildah", "debootstrap", progress=progress)
    storage = cache_directory() / "image"
    storage.mkdir(parents=True, exist_ok=True)
    with exclusive(storage / "lock", "building the image", progress):
        if _buildah(storage, "images", "--quiet", _BASE, check=False).strip() == "":
            _make_base(storage, progress)
        progress("building the image from the Dockerfile")
        bundle = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        certificates = Path(bundle).resolve().parent
        pip = storage / "pip.conf"  # mounted, so that nothing of this machine stays in the image
        pip.write_text(f"[global]\ncert = {bundle}\n")
        _buildah(
            storage,
            *("build", "--network", "host", "--build-arg", f"BASE={_BASE}", "--pull-never"),
            *(
                "--volume",
                f"{certificates}:{certificates}:ro",
                "--volume",
                f"{pip}:/etc/pip.conf:ro",
            ),
            *("--tag", IMAGE, "--file", str(ROOT / "Dockerfile"), str(ROOT)),
        )
        archive.unlink(missing_ok=True)
        _buildah(storage, "push", IMAGE, f"docker-archive:{archive}:{IMAGE}")
    return archive


def _make_base(storage: Path, progress: Progress) -> None:
    tree = storage / "base.partial"
    shutil.rmtree(tree, ignore_errors=True)
    progress("making the base image with debootstrap (once; about a minute)")
    parts = [s.distribution_part(codename()) for s in machine_sources(Path("/etc/apt"))]
    mirrors = [uri for part in parts if part is not None for uri in part.uris]
    packages = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, codename(), str(tree), *mirrors[:1]]
    _run(command)
    container = _buildah(storage, "from", "scratch").strip()
    _buildah(storage, "add", "--quiet", container, str(tree), "/")
    _buildah(storage, "commit", "--quiet", "--rm", container, _BASE)
    shutil.rmtree(tree)


def _buildah(storage: Path, *arguments: str, check: bool = True) -> str:
    places = ["--root", str(storage / "root"), "--runroot", str(storage / "run")]
    return _run(["buildah", *places, *arguments], check=check)


def _run(command: Sequence[str], *, check: bool = True) -> str:
    """Standard output; RuntimeError with the last lines of both streams where it fails."""
    own = {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **own}
    )
    if check and done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}:\n{last}")
    return done.stdout
