"""Real Prometheus, etcd, containerd and Go from Debian's packages, without installing them.

`make run`, `make demo` and the tests need real programs, and must neither need root nor change the
machine: no package is installed, no service is started. So packages are downloaded with apt into a
cache of our own and unpacked there with dpkg-deb. Package lists are kept in the cache as well,
because those of the machine may be missing, old, or spoilt by third-party sources.

The cache is `$UPKEEP_CACHE`, else `$XDG_CACHE_HOME/upkeep`, else `~/.cache/upkeep`. It may be
deleted at any time; what is unpacked stays at its version until then.

Shared libraries: everything here needs libc and, for runc, libseccomp, which apt itself depends
on. It is checked all the same, so that a missing one is named and not met as exit code 127.

By hand: `python -m deploy.local.debian prometheus etcd` prints where the programs are.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploy.local.apt import DebianError, Kind, apt_get, codename
from deploy.local.cache import Progress, cache_directory, exclusive, print_progress

__all__ = [
    "BINARIES",
    "DebianError",
    "binary",
    "cache_directory",
    "cni_plugins",
    "download_source",
    "require_installed",
    "source_version",
    "unpack",
]

_CONTAINERD = ("containerd", "runc")  # one tree: the shim looks for runc beside it, on PATH
_GO = ("golang-1.19-go", "golang-1.19-src")

# program -> (packages that make up its tree, path in that tree)
BINARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "prometheus": (("prometheus",), "usr/bin/prometheus"),
    "promtool": (("prometheus",), "usr/bin/promtool"),
    "prometheus-alertmanager": (("prometheus-alertmanager",), "usr/bin/prometheus-alertmanager"),
    "amtool": (("prometheus-alertmanager",), "usr/bin/amtool"),
    "prometheus-node-exporter": (("prometheus-node-exporter",), "usr/bin/prometheus-node-exporter"),
    "etcd": (("etcd-server",), "usr/bin/etcd"),
    "etcdctl": (("etcd-client",), "usr/bin/etcdctl"),
    "containerd": (_CONTAINERD, "usr/bin/containerd"),
    "containerd-shim-runc-v2": (_CONTAINERD, "usr/bin/containerd-shim-runc-v2"),
    "ctr": (_CONTAINERD, "usr/bin/ctr"),
    "runc": (_CONTAINERD, "usr/sbin/runc"),
    "busybox": (("busybox-static",), "bin/busybox"),
    "go": (_GO, "usr/lib/go-1.19/bin/go"),
}


def unpack(*packages: str, progress: Progress = print_progress) -> Path:
    """The root folder of a tree holding exactly these packages, downloaded when first asked for.

    The same set gives the same folder; `.upkeep-packages.json` in it has the versions. Safe to
    call from several processes at once. The folder appears by a rename when it is complete, so an
    interrupted call leaves nothing that looks finished.

    Raises DebianError if the machine is neither Debian nor Ubuntu, or a package can't be had.
    """
    for package in packages:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package):
            raise DebianError(f"{package!r} is not the name of a Debian package")
    names = sorted(set(packages))
    if not names:
        raise DebianError("unpack() needs the name of at least one Debian package")
    root = _machine_cache() / "roots" / "_".join(names)  # no package name has a "_"
    if root.exists():
        return root
    _require_apt(names)
    root.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(root.parent / f"{root.name}.lock", f"unpacking {', '.join(names)}", progress):
        if root.exists():
            return root
        for left in root.parent.glob(f".{root.name}.*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as temporary:
            tree = Path(temporary) / "tree"
            versions = _download_and_extract(names, Path(temporary), tree, progress)
            _check_libraries(tree, names)
            (tree / ".upkeep-packages.json").write_text(json.dumps(versions, indent=2) + "\n")
            tree.rename(root)
    progress(f"unpacked {', '.join(f'{n} {v}' for n, v in versions.items())} in {root}")
    return root


def binary(name: str, *, progress: Progress = print_progress) -> Path:
    """The absolute path of one of the programs in BINARIES, unpacking its package at need.

    Where there is no apt, a program of that name on PATH is taken. Raises DebianError if there is
    none, or for a name that isn't in BINARIES.
    """
    if name not in BINARIES:
        raise DebianError(f"no package known for {name!r}; known: {', '.join(sorted(BINARIES))}")
    packages, path = BINARIES[name]
    if not codename() and (found := shutil.which(name)):
        return Path(found)
    program = unpack(*packages, progress=progress) / path
    if not program.exists():
        raise DebianError(f"package {packages[0]} holds no {path}: this Debian release differs")
    return program


def cni_plugins(*, progress: Progress = print_progress) -> Path:
    """The folder with the standard CNI plugins (bridge, host-local, loopback, portmap …)."""
    return unpack("containernetworking-plugins", progress=progress) / "usr/lib/cni"


def download_source(
    package: str, directory: Path, *, progress: Progress = print_progress
) -> list[Path]:
    """Download the files of a source package (`.dsc`, `.orig.tar.*` …) into `directory`.

    apt checks them against the signed index. Raises DebianError.
    """
    _require_apt([package])
    _apt(
        "deb-src",
        ["source", "--download-only", "--only-source", package],
        directory,
        progress,
    )
    return sorted(directory.glob(f"{package}_*"))


def source_version(package: str, *, progress: Progress = print_progress) -> str:
    """The newest version of a source package that the machine's Debian release has."""
    _require_apt([package])
    output = _apt(
        "deb-src",
        ["source", "--print-uris", "--download-only", "--only-source", package],
        _machine_cache(),
        progress,
    )
    found = re.search(rf"^\S+ ({re.escape(package)}_(\S+)\.dsc) ", output, re.MULTILINE)
    if not found:
        raise DebianError(f"apt lists no source package {package!r} for this Debian release")
    return found[2]


def require_installed(*packages: str, progress: Progress = print_progress) -> None:
    """See to it that packages are installed on this machine: for tools that work in no other way.

    As root they are installed with apt-get; otherwise DebianError says the command to run.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if not missing:
        return
    _require_apt(missing)
    if os.geteuid() != 0:
        raise DebianError(
            f"not installed: {', '.join(missing)}. Run: sudo apt-get install {' '.join(missing)}"
        )
    progress(f"installing {', '.join(missing)}")
    marks = "Dir::State::extended_states=/var/lib/apt/extended_states"  # the machine's, not ours
    command = ["install", "--yes", "--no-install-recommends", "-o", marks, *missing]
    with exclusive(_machine_cache() / "install.lock", "installing packages", progress):
        _apt("deb", command, _machine_cache(), progress)


def _download_and_extract(
    names: Sequence[str], temporary: Path, tree: Path, progress: Progress
) -> dict[str, str]:
    progress(f"downloading {', '.join(names)} from Debian")
    debs = temporary / "debs"
    debs.mkdir()
    _apt("deb", ["download", *names], debs, progress)
    versions = {}
    for deb in sorted(debs.glob("*.deb")):
        fields = _run(["dpkg-deb", "--show", "--showformat=${Package} ${Version}", str(deb)])
        name, version = fields.split()
        versions[name] = version
        _run(["dpkg-deb", "--extract", str(deb), str(tree)])
    if missing := sorted(set(names) - set(versions)):
        raise DebianError(f"apt-get download gave no package for {', '.join(missing)}")
    return versions


def _apt(kind: Kind, arguments: Sequence[str], directory: Path, progress: Progress) -> str:
    state = _machine_cache() / "apt"
    return apt_get(kind, arguments, state=state, directory=directory, progress=progress)


def _check_libraries(tree: Path, names: Sequence[str]) -> None:
    programs = [
        path
        for folder in ("bin", "sbin", "usr/bin", "usr/sbin", "usr/lib/cni", "usr/lib/go-1.19/bin")
        if (tree / folder).is_dir()
        for path in sorted((tree / folder).iterdir())
        if path.is_file() and _is_elf(path)
    ]
    missing = set()
    for program in programs:
        listed = subprocess.run(
            ["ldd", str(program)], capture_output=True, text=True, check=False
        ).stdout
        missing |= set(re.findall(r"^\s*(\S+) => not found", listed, re.MULTILINE))
    if missing:
        raise DebianError(
            f"{', '.join(names)} need shared libraries that this machine lacks: "
            f"{', '.join(sorted(missing))}. Install the Debian packages that hold them"
        )


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _require_apt(names: Sequence[str]) -> None:
    wanted = ", ".join(names)
    release = codename()
    if not release:
        raise DebianError(
            f"cannot get {wanted}: this system is neither Debian nor Ubuntu. Run it on Debian 12 "
            "(a virtual machine or container will do), or put the programs on PATH yourself"
        )
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DebianError(f"cannot get {wanted}: {tool} is not on PATH; install Debian's apt")


def _is_installed(package: str) -> bool:
    status = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${db:Status-Abbrev}", package],
        capture_output=True,
        text=True,
        check=False,
    )
    return status.returncode == 0 and status.stdout.startswith("ii")


def _machine_cache() -> Path:
    """Below the cache one folder per release and architecture: a home may be shared."""
    return cache_directory() / "debian" / f"{codename() or 'none'}-{platform.machine()}"


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DebianError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """`python -m deploy.local.debian NAME…`: print the path of each program."""
    try:
        for name in arguments:
            print(binary(name))
    except DebianError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
