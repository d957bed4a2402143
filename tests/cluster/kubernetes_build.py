"""Kubernetes v1.20.2 programs, built once from Debian's source package and kept in the cache.

No package registry has kubeadm, the control plane or the kubelet as binaries, but Debian 12's
source package `kubernetes` is the whole tree with its vendored dependencies. The compiler is
Debian's Go, unpacked and not installed. A first build takes five to ten minutes on two cores.

The tree is from early 2021, so two mends are needed with Go 1.19: the vendored reflect2 1.0.1
crashes at start on Go >= 1.18 (Debian's 1.0.2 replaces it), and one generated file is missing (the
OpenAPI definitions, which `make` would generate; `make` itself doesn't work here).

Newer Kubernetes: where `$KUBEBUILDER_ASSETS` (the envtest convention) has all six programs they
are taken; versions are never mixed.

By hand: `python -m tests.cluster.kubernetes_build` builds at need and prints the folder.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local.cache import Progress, cache_directory, exclusive, print_progress
from deploy.local.debian import (
    DebianError,
    binary,
    download_source,
    require_installed,
    source_version,
    unpack,
)
from tests.cluster import die_with_parent

RECIPE = 1
"""Raise it when this file builds something different, so that older results aren't used."""

PROGRAMS = (
    "kubeadm",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kubectl",
)
_TREE = "k8s.io/kubernetes"
_VERSION_PACKAGES = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
_PAUSE = "*/build/pause/linux/pause.c"
_NO_OPENAPI = ("code-generator", "sample-apiserver", "kube-openapi", "test")


class BuildError(RuntimeError):
    """Kubernetes could not be built; the message has the failing command's last lines."""


@dataclass(frozen=True)
class Binaries:
    """Absolute paths of programs of one Kubernetes version."""

    directory: Path
    version: str
    """Such as "v1.20.2"."""

    @property
    def kubeadm(self) -> Path:
        return self.directory / "kubeadm"

    @property
    def kube_apiserver(self) -> Path:
        return self.directory / "kube-apiserver"

    @property
    def kube_controller_manager(self) -> Path:
        return self.directory / "kube-controller-manager"

    @property
    def kube_scheduler(self) -> Path:
        return self.directory / "kube-scheduler"

    @property
    def kubelet(self) -> Path:
        return self.directory / "kubelet"

    @property
    def kubectl(self) -> Path:
        return self.directory / "kubectl"

    @property
    def pause(self) -> Path:
        """The sandbox image's program. Compiled at first use, as it alone needs a C compiler."""
        return pause_binary()


def kubernetes_binaries(*, progress: Progress = print_progress) -> Binaries:
    """The Kubernetes programs: from `$KUBEBUILDER_ASSETS`, else from the cache, else built now.

    Raises BuildError or DebianError. Two processes asking at once build once.
    """
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        folder = Path(assets).absolute()
        missing = [name for name in PROGRAMS if not os.access(folder / name, os.X_OK)]
        if not missing:
            said = _run([str(folder / "kube-apiserver"), "--version"], cwd=folder)
            return Binaries(folder, said.split()[-1])
        progress(
            f"$KUBEBUILDER_ASSETS ({folder}) lacks {', '.join(missing)}: "
            "taking all programs from the project's own build"
        )
    if found := _built():
        return found
    home = _home()
    with exclusive(home / "build.lock", "building Kubernetes", progress):
        return _built() or _build(home, progress)


def pause_binary(*, progress: Progress = print_progress) -> Path:
    """The static `pause` program, compiled from the tree's own pause.c with gcc."""
    home = _home()
    built = home / f"pause-r{RECIPE}"
    if built.exists():
        return built
    if shutil.which("gcc") is None:
        require_installed("gcc", "libc6-dev", progress=progress)
    with exclusive(home / "build.lock", "building Kubernetes", progress):
        if built.exists():
            return built
        with tempfile.TemporaryDirectory(prefix=".pause-", dir=home) as folder:
            archive = str(_download(Path(folder), progress))
            _run(["tar", "--extract", "--file", archive, "--wildcards", _PAUSE], cwd=Path(folder))
            source = next(Path(folder).glob(_PAUSE))
            new = Path(folder) / "pause"
            flags = ["-Os", "-Wall", "-Werror", "-static", "-DVERSION=v3.2"]
            _run(["gcc", *flags, "-o", str(new), str(source)], cwd=Path(folder))
            new.rename(built)
    return built


def _home() -> Path:
    home = cache_directory() / "kubernetes" / platform.machine()
    home.mkdir(parents=True, exist_ok=True)
    return home


def _built() -> Binaries | None:
    """The newest complete build. A folder appears by a rename once everything is in it."""
    done = sorted(_home().glob(f"*_r{RECIPE}"), key=lambda folder: folder.stat().st_mtime)
    if not done:
        return None
    return Binaries(done[-1], (done[-1] / "VERSION").read_text().strip())


def _build(home: Path, progress: Progress) -> Binaries:
    start = time.monotonic()
    result = home / f"{source_version('kubernetes', progress=progress)}_r{RECIPE}"
    for left in home.glob(".build-*"):  # of a run that was killed; the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    progress("building Kubernetes from Debian's source package: five to ten minutes, only once")
    cache = home / "go-build"  # kept after a failure: an interrupted build goes on where it was
    with tempfile.TemporaryDirectory(prefix=".build-", dir=home) as folder:
        path = Path(folder)
        tree = path / "gopath/src" / _TREE
        version = _unpack_source(path, tree, progress)
        _replace_reflect2(tree, progress)
        go = _Go(path / "gopath", cache, tree, progress)
        _generate_openapi(go, path)
        binaries = path / "result"
        binaries.mkdir()
        go.build(binaries, [f"./cmd/{name}" for name in PROGRAMS], _version_flags(version))
        (binaries / "VERSION").write_text(version + "\n")
        binaries.rename(result)
    shutil.rmtree(cache, ignore_errors=True)
    progress(f"built Kubernetes {version} in {time.monotonic() - start:.0f} s: {result}")
    return Binaries(result, version)


def _download(folder: Path, progress: Progress) -> Path:
    for file in download_source("kubernetes", folder, progress=progress):
        if ".orig.tar." in file.name:
            return file
    raise DebianError("Debian's source package kubernetes holds no .orig.tar file")


def _unpack_source(folder: Path, tree: Path, progress: Progress) -> str:
    """Unpack the tree to `tree`; the version it says it is, from its top folder's name."""
    archive = _download(folder, progress)
    progress(f"unpacking {archive.name}")
    _run(["tar", "--extract", "--file", str(archive)], cwd=folder)
    top = next(folder.glob("kubernetes-*"))
    tree.parent.mkdir(parents=True)
    top.rename(tree)
    return "v" + top.name.removeprefix("kubernetes-")


def _replace_reflect2(tree: Path, progress: Progress) -> None:
    newer = unpack("golang-github-modern-go-reflect2-dev", progress=progress)
    vendored = tree / "vendor/github.com/modern-go/reflect2"
    shutil.rmtree(vendored)
    shutil.copytree(newer / "usr/share/gocode/src/github.com/modern-go/reflect2", vendored)


def _generate_openapi(go: _Go, folder: Path) -> None:
    go.build(folder / "openapi-gen", ["./vendor/k8s.io/kube-openapi/cmd/openapi-gen"])
    packages = sorted(set(_openapi_packages(go.tree)))
    go.progress(f"generating OpenAPI definitions of {len(packages)} packages")
    _run(
        [
            str(folder / "openapi-gen"),
            "--go-header-file=hack/boilerplate/boilerplate.generatego.txt",
            f"--input-dirs={','.join(packages)}",
            f"--output-package={_TREE}/pkg/generated/openapi",
            "--output-file-base=zz_generated.openapi",
            f"--report-filename={folder / 'openapi-violations'}",
        ],
        cwd=go.tree,
        environment=go.environment,
    )


def _openapi_packages(tree: Path) -> Iterable[str]:
    """Import paths of packages with the tag, but for samples, tests and the generators."""
    for top in ("pkg", "staging/src"):
        for file in (tree / top).rglob("*.go"):
            folder = file.parent.relative_to(tree)
            if set(_NO_OPENAPI) & set(folder.parts) or file.name.endswith("_test.go"):
                continue
            if b"+k8s:openapi-gen=" in file.read_bytes():
                yield f"{_TREE}/{folder}".replace("/staging/src/", "/vendor/")


def _version_flags(version: str) -> str:
    major, minor = re.findall(r"\d+", version)[:2]
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    return " ".join(
        f"-X {_TREE}/vendor/{package}.{name}={value}"
        for package in _VERSION_PACKAGES
        for name, value in values.items()
    )


class _Go:
    """Debian's Go in GOPATH mode on one tree, telling how far it is."""

    def __init__(self, gopath: Path, cache: Path, tree: Path, progress: Progress) -> None:
        self.program = binary("go", progress=progress)
        self.tree = tree
        self.progress = progress
        self.environment = {
            "PATH": f"{self.program.parent}:{os.environ.get('PATH', os.defpath)}",
            "HOME": str(gopath),
            "GOPATH": str(gopath),
            "GOROOT": str(self.program.parent.parent),
            "GOCACHE": str(cache),
            "GO111MODULE": "off",
            "CGO_ENABLED": "0",
        }

    def build(self, output: Path, packages: Sequence[str], linker_flags: str = "") -> None:
        """`go build` into the file or existing folder `output`."""
        listed = _run(
            [str(self.program), "list", "-deps", *packages],
            cwd=self.tree,
            environment=self.environment,
        )
        total = len(listed.split())
        names = ", ".join(package.rsplit("/", 1)[1] for package in packages)
        self.progress(f"compiling {names}: up to {total} packages")
        command = [
            str(self.program),
            "build",
            "-v",
            "-trimpath",
            "-ldflags",
            f"-s -w {linker_flags}",
        ]
        compiled: list[str] = []
        with subprocess.Popen(
            die_with_parent.wrap([*command, "-o", str(output), *packages]),
            cwd=self.tree,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            for line in process.stderr or ():
                compiled.append(line)
                if len(compiled) % 100 == 0:
                    self.progress(f"  compiled {len(compiled)} of {total} packages")
        if process.returncode != 0:
            raise BuildError(f"go build {names} failed:\n" + "".join(compiled[-20:]).rstrip())


def _run(command: Sequence[str], *, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BuildError(f"{command[0]} failed:\n{last}")
    return done.stdout


def main() -> int:
    """Build at need; print the folder on stdout."""
    try:
        print(kubernetes_binaries().directory)
    except (BuildError, DebianError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
