"""Container images made on the spot, since no registry of images can be reached.

An image here is a docker-archive with one layer, which `ctr images import` takes. The same files
give the same bytes. Finished archives stay in the cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.cache import cache_directory, exclusive
from deploy.local.debian import binary, require_installed
from tests.cluster.kubernetes_build import Binaries

WORKLOAD = "upkeep.test/workload:1"
"""busybox with all its commands, and /zombies (see workloads/zombies.c)."""
_WORKLOADS = Path(__file__).parent / "workloads"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_RECIPE = 1


@dataclass(frozen=True)
class Image:
    """What an image is made of."""

    reference: str
    """Name with its tag, as pods write it."""
    files: Mapping[str, Path]
    """Absolute path in the image -> file on this machine."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Absolute path in the image -> where the symbolic link there points."""
    entrypoint: tuple[str, ...] = ()


def workload_image() -> Image:
    """The image for tenants' containers."""
    busybox = binary("busybox")
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True)
    commands = set(listed.stdout.split()) - {"busybox"}
    return Image(
        WORKLOAD,
        files={"/bin/busybox": busybox, "/zombies": compiled("zombies")},
        links={f"/bin/{name}": "busybox" for name in commands},
    )


def control_plane_images(binaries: Binaries, references: list[str]) -> list[Image]:
    """The images that a kubeadm of this version wants, out of `kubeadm config images list`.

    kube-proxy and CoreDNS are left out: no test needs them, and neither is built.
    """
    wanted = {re.split(r"[/:]", reference)[-2]: reference for reference in references}
    images = [
        Image(wanted[path.name], {f"/usr/local/bin/{path.name}": path}, {}, ())
        for path in (
            binaries.kube_apiserver,
            binaries.kube_controller_manager,
            binaries.kube_scheduler,
        )
    ]
    etcd = {name: binary(name) for name in ("etcd", "etcdctl")}
    libraries = {str(path): path for program in etcd.values() for path in _libraries(program)}
    files = {f"/usr/local/bin/{name}": path for name, path in etcd.items()}
    images.append(Image(wanted["etcd"], {**files, **libraries}))
    images.append(Image(wanted["pause"], {"/pause": binaries.pause}, entrypoint=("/pause",)))
    return images


def compiled(name: str) -> Path:
    """The static program made of workloads/NAME.c; compiled with gcc when first asked for."""
    source = _WORKLOADS / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    program = _cache() / f"{name}-{digest}"
    if not program.exists():
        if shutil.which("gcc") is None:
            require_installed("gcc", "libc6-dev")
        with exclusive(_cache() / "lock", f"compiling {name}"):
            new = program.with_suffix(".new")
            flags = ["-static", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
            subprocess.run(["gcc", *flags, "-o", str(new), str(source)], check=True)
            new.rename(program)
    return program


def archive(image: Image) -> Path:
    """The image as a docker-archive file in the cache."""
    name = re.sub(r"[^a-z0-9.-]+", "_", image.reference)
    path = _cache() / f"{name}-{_identity(image)}.tar"
    with exclusive(_cache() / f"{name}.lock", f"making the image {image.reference}"):
        if not path.exists():
            for older in _cache().glob(f"{name}-*.tar"):
                older.unlink()
            new = path.with_suffix(".new")
            _write(image, new)
            new.rename(path)
    return path


def _identity(image: Image) -> str:
    """Changes when any of the files does; by size and time, as hashing takes seconds."""
    files = {
        path: (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for path, file in sorted(image.files.items())
    }
    made_of = [_RECIPE, files, sorted(image.links.items()), image.entrypoint]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _write(image: Image, path: Path) -> None:
    layer = path.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        for folder in sorted({"/tmp", "/run", *_folders(image)}):
            entry = _entry(folder, tarfile.DIRTYPE, 0o1777 if folder == "/tmp" else 0o755)
            tar.addfile(entry)
        for target, file in sorted(image.files.items()):
            entry = _entry(target, tarfile.REGTYPE, 0o755)
            entry.size = file.stat().st_size
            with file.open("rb") as content:
                tar.addfile(entry, content)
        for target, link in sorted(image.links.items()):
            entry = _entry(target, tarfile.SYMTYPE, 0o777)
            entry.linkname = link
            tar.addfile(entry)
    with layer.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    config = {
        "created": "1970-01-01T00:00:00Z",
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/bin:/bin"],
            **({"Entrypoint": list(image.entrypoint)} if image.entrypoint else {}),
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    text = json.dumps(config, sort_keys=True).encode()
    named = f"{hashlib.sha256(text).hexdigest()}.json"
    manifest = [{"Config": named, "RepoTags": [image.reference], "Layers": [f"{digest}/layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        for name, data in ((named, text), ("manifest.json", json.dumps(manifest).encode())):
            entry = _entry(name, tarfile.REGTYPE, 0o644)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        entry = _entry(f"{digest}/layer.tar", tarfile.REGTYPE, 0o644)
        entry.size = layer.stat().st_size
        with layer.open("rb") as content:
            tar.addfile(entry, content)
    layer.unlink()


def _entry(path: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    """One file of an archive, without anything that differs from run to run."""
    entry = tarfile.TarInfo(path.lstrip("/"))
    entry.type = kind
    entry.mode = mode
    return entry


def _folders(image: Image) -> set[str]:
    paths = [*image.files, *image.links]
    return {str(parent) for path in paths for parent in Path(path).parents} - {"/"}


def _libraries(program: Path) -> list[Path]:
    """The shared libraries and the loader of a program, at the paths where it looks for them."""
    listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True)
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", listed.stdout)]


def _cache() -> Path:
    folder = cache_directory() / "images" / os.uname().machine
    folder.mkdir(parents=True, exist_ok=True)
    return folder
