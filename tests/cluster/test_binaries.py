"""Programs from Debian's packages: got once, whole or not at all, and nothing else touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local import debian
from deploy.local.apt import Source, machine_sources
from deploy.local.debian import BINARIES, DebianError, binary, cni_plugins, unpack
from tests.cluster import kubernetes_build
from tests.cluster.kubernetes_build import PROGRAMS, kubernetes_binaries, pause_binary

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGE = "busybox-static"  # small, and runs anywhere


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this module's own, so that package lists are read once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPKEEP_CACHE", str(shared_cache))
    for roots in shared_cache.glob("debian/*/roots"):
        shutil.rmtree(roots)
    return shared_cache


def start(*packages: str, cache: Path) -> subprocess.Popen[str]:
    """Another process that unpacks; progress on stderr, the folder on stdout."""
    code = "import sys; from deploy.local.debian import unpack; print(unpack(*sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *packages],
        env={**os.environ, "UPKEEP_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_over(cache: Path) -> list[Path]:
    return [path for path in cache.glob("debian/*/roots/.*") if path.is_dir()]


def test_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("UPKEEP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert debian.cache_directory() == Path("/home/somebody/.cache/upkeep")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/xdg")
    assert debian.cache_directory() == Path("/var/tmp/xdg/upkeep")
    monkeypatch.setenv("UPKEEP_CACHE", str(tmp_path))
    assert debian.cache_directory() == tmp_path


def test_only_debians_own_sources_are_read(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://commented.example/debian bookworm main\n"
        "deb http://mirror.example/debian bookworm main contrib # a remark\n"
        f"deb [arch=amd64 signed-by={KEYRING}] https://m.example/debian-security/ "
        "bookworm-security main\n"
        "deb-src http://mirror.example/debian bookworm main\n"
    )
    (parts / "tools.list").write_text(
        "deb https://apt.releases.example.com bookworm main\n"
        "deb https://download.example.com/linux/debian bookworm stable\n"
        "deb https://packages.example.com/apt cloud-sdk-bookworm main\n"
        "deb http://mirror.example/debian trixie main\n"
    )
    (parts / "debian.sources").write_text(
        "Types: deb deb-src\n# a remark\nURIs: mirror+file:///etc/apt/mirrors/debian.list\n"
        "Suites: bookworm bookworm-updates bookworm-backports\n"
        "Components: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n AAAA\n"
        "\n"
        "Types: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n"
        "Enabled: no\n"
    )
    found = [s.distribution_part("bookworm") for s in machine_sources(tmp_path)]
    key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n AAAA"
    assert [source for source in found if source] == [
        Source(("http://mirror.example/debian",), ("bookworm",), ("main",)),
        Source(("https://m.example/debian-security/",), ("bookworm-security",), ("main",), KEYRING),
        Source(
            ("mirror+file:///etc/apt/mirrors/debian.list",),
            ("bookworm", "bookworm-updates"),
            ("main",),
            key,
        ),
    ]
    assert len(found) == 7


def test_ubuntus_own_archive_is_told_from_others(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "ubuntu.sources").write_text(
        "Types: deb\nURIs: http://mirror.example/ubuntu/\nSuites: noble noble-updates "
        "noble-backports\nComponents: main restricted universe multiverse\n"
        f"Signed-By: {KEYRING}\n\n"
        "Types: deb\nURIs: https://ppa.example/somebody/ppa/ubuntu/\nSuites: noble\n"
        "Components: main\n"
    )
    found = [s.distribution_part("noble") for s in machine_sources(tmp_path)]
    assert found == [
        Source(
            ("http://mirror.example/ubuntu/",),
            ("noble", "noble-updates"),
            ("main", "universe"),
            KEYRING,
        ),
        None,
    ]
    assert found[0] is not None
    assert "Components: main universe\n" in found[0].stanza("deb")


@pytest.mark.debian
def test_second_call_gives_the_same_without_a_word(cache: Path) -> None:
    said: list[str] = []
    root = unpack(PACKAGE, progress=said.append)
    assert root.is_relative_to(cache)
    assert any(PACKAGE in line for line in said)
    done = subprocess.run(
        [root / "bin/busybox", "echo", "it runs"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "it runs\n"
    again: list[str] = []
    assert unpack(PACKAGE, PACKAGE, progress=again.append) == root
    assert again == []
    assert left_over(cache) == []


@pytest.mark.debian
def test_processes_at_once_download_once(cache: Path) -> None:
    processes = [start(PACKAGE, cache=cache) for _ in range(3)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    said = "".join(stderr for _, stderr in outputs)
    assert said.count("downloading") == 1, said
    assert Path(outputs[0][0].strip(), "bin/busybox").exists()


@pytest.mark.debian
@pytest.mark.parametrize("when", ["downloading", "Get:"])
def test_killed_in_the_middle_leaves_nothing_that_looks_complete(cache: Path, when: str) -> None:
    process = start("prometheus-node-exporter", cache=cache)
    assert process.stderr is not None
    for line in process.stderr:
        if when in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list(cache.glob("debian/*/roots/prometheus*/")) == []
    assert left_over(cache) != []
    root = unpack("prometheus-node-exporter")
    assert (root / "usr/bin/prometheus-node-exporter").exists()
    assert left_over(cache) == []


@pytest.mark.debian
def test_unknown_package_is_named(cache: Path) -> None:
    with pytest.raises(DebianError, match="no-such-package"):
        unpack("no-such-package")
    with pytest.raises(DebianError, match="'--help' is not the name"):
        unpack("--help")
    with pytest.raises(DebianError, match="no package known for 'no-such-program'"):
        binary("no-such-program")
    assert left_over(cache) == []


@pytest.mark.debian
def test_without_apt_the_package_and_a_remedy_are_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.exists()
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(DebianError, match=r"cannot get prometheus: apt-get.*install"):
        unpack("prometheus")


@pytest.mark.usefixtures("cache")
def test_elsewhere_than_on_debian_a_program_on_path_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "codename", lambda: "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DebianError, match=r"cannot get prometheus: this system is neither"):
        binary("promtool")
    program = tmp_path / "promtool"
    program.touch(mode=0o755)
    assert binary("promtool") == program


@pytest.mark.debian
@pytest.mark.root
def test_works_as_an_ordinary_user(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = open_folder / "own"
    own.mkdir()
    os.chown(own, 65534, 65534)
    monkeypatch.setenv("UPKEEP_CACHE", str(own))

    def as_nobody() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        root = unpack(PACKAGE)
        assert (root / "bin/busybox").stat().st_uid == 65534

    assert in_child(as_nobody) == 0
    assert list(own.glob(f"debian/*/roots/{PACKAGE}/bin/busybox"))


def in_child(work: Callable[[], None]) -> int:
    """Run it in a fork of this process, which may give up its rights; the exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.debian
def test_missing_shared_library_is_named(tmp_path: Path) -> None:
    runc = binary("runc").read_bytes()
    assert b"libseccomp.so.2" in runc
    program = tmp_path / "usr/bin/runc"
    program.parent.mkdir(parents=True)
    program.write_bytes(runc.replace(b"libseccomp.so.2", b"libnothere.so.2"))
    program.chmod(0o755)
    with pytest.raises(DebianError, match=r"runc need.*libnothere\.so\.2"):
        debian._check_libraries(tmp_path, ["runc"])
    program.write_bytes(runc)
    debian._check_libraries(tmp_path, ["runc"])


@pytest.mark.debian
def test_installing_is_left_to_root(monkeypatch: pytest.MonkeyPatch) -> None:
    debian.require_installed("dpkg", "apt")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DebianError, match=r"sudo apt-get install no-such-package$"):
        debian.require_installed("dpkg", "no-such-package")


@pytest.mark.debian
@pytest.mark.parametrize("name", sorted(BINARIES))
def test_every_program_runs(name: str) -> None:
    program = binary(name)
    arguments = {"go": ["version"], "busybox": ["true"], "etcdctl": ["version"]}
    done = subprocess.run(
        [
            program,
            *arguments.get(name, ["--version" if name != "containerd-shim-runc-v2" else "-v"]),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.debian
def test_cni_plugins_are_there() -> None:
    names = {plugin.name for plugin in cni_plugins().iterdir()}
    assert {"bridge", "host-local", "loopback", "portmap"} <= names


@pytest.mark.debian
def test_kubernetes_programs_are_of_one_version() -> None:
    binaries = kubernetes_binaries()
    for name in PROGRAMS:
        arguments = {"kubeadm": ["version", "-o=short"], "kubectl": ["version", "--client"]}
        done = subprocess.run(
            [binaries.directory / name, *arguments.get(name, ["--version"])],
            capture_output=True,
            text=True,
            check=True,
        )
        assert binaries.version in done.stdout, name


@pytest.mark.debian
def test_pause_is_static_and_kubernetes_own() -> None:
    pause = pause_binary()
    done = subprocess.run([pause, "-v"], capture_output=True, text=True, check=True)
    assert done.stdout == "pause.c v3.2\n"
    listed = subprocess.run(["ldd", pause], capture_output=True, text=True, check=False)
    assert "not a dynamic executable" in listed.stderr


@pytest.mark.debian
def test_newer_kubernetes_is_taken_where_all_of_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = kubernetes_binaries()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    for name in PROGRAMS:
        (tmp_path / name).symlink_to(own.directory / name)
    found = kubernetes_binaries()
    assert (found.directory, found.version) == (tmp_path, own.version)
    (tmp_path / "kubeadm").unlink()
    said: list[str] = []
    assert kubernetes_binaries(progress=said.append) == own
    assert "lacks kubeadm" in said[0]


@pytest.mark.debian
def test_killed_build_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary("go")  # so that the other cache needs no download of its own
    (tmp_path / "debian").symlink_to(debian.cache_directory() / "debian")
    monkeypatch.setenv("UPKEEP_CACHE", str(tmp_path))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.kubernetes_build"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "compiling openapi-gen" in line:
            process.kill()
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "".join(said)
    assert kubernetes_build._built() is None
