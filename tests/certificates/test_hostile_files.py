"""What anybody may put where the exporter looks as root: a kubeconfig in their own home."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from exporter.checks.certificates import CertificateReader, Root
from exporter.checks.certificates.parsing import MAX_FOUND, parse
from tests.certificates.test_reading import KUBECONFIG, ONE, encoded, kubeconfig, pem


def test_c54_what_is_no_file_is_not_even_opened(tmp_path: Path) -> None:
    """Of a pipe it can be seen: who writes to it waits until somebody opens it."""
    (tmp_path / "config").write_bytes(kubeconfig({"client-certificate": "/pipe"}, {}))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.open("wb").close())
    writer.start()
    time.sleep(0.2)
    inventory = CertificateReader(Root(tmp_path), ["/config", "/pipe"]).read()
    writer.join(0.2)
    written = not writer.is_alive()
    os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
    writer.join()
    assert not written
    assert {(e.path, e.reason) for e in inventory.errors} == {("/pipe", "not_a_file")}


def test_c54_thousands_of_certificates_in_one_file_are_not_thousands_of_series() -> None:
    one = pem(ONE)
    bundle = parse(one * (MAX_FOUND + 1))
    assert (len(bundle.certificates), bundle.problem) == (MAX_FOUND, "too_many")
    assert parse(one * MAX_FOUND).problem == ""
    user = f"&u {{name: u, user: {{client-certificate-data: {encoded(one)}}}}}"
    again = "".join(f", {alias}" for alias in ["*u"] * 400_000)
    begun = time.process_time()
    aliases = parse(f"users: [{user}{again}]\n".encode())
    assert (len(aliases.certificates), aliases.problem) == (MAX_FOUND, "too_many")
    named = ", ".join(f"{{name: u, user: {{client-certificate: /{n}}}}}" for n in range(10_000))
    many = parse(f"users: [{named}]\n".encode())
    assert (len(many.references), many.problem) == (MAX_FOUND, "too_many")
    assert time.process_time() - begun < 20


@pytest.mark.parametrize("named", ["a\0b", "/" + "a/" * 2100])
def test_c54_a_path_that_is_none_spoils_its_own_file_only(tmp_path: Path, named: str) -> None:
    (tmp_path / "a").write_bytes(kubeconfig({"client-certificate": named}, {}))
    (tmp_path / "b").write_bytes(pem(ONE))
    found = CertificateReader(Root(tmp_path), ["/a", "/b"]).read()
    assert [c.path for c in found.certificates] == ["/b"]
    assert [(e.path, e.reason) for e in found.errors] == [("/a", "malformed")]


def test_c54_only_certificates_are_named_by_a_kubeconfig_not_more_kubeconfigs(
    tmp_path: Path,
) -> None:
    for number in range(9):
        text = kubeconfig({"client-certificate": f"{number + 1}"}, {})
        (tmp_path / f"{number}").write_bytes(text)
    (tmp_path / "9").write_bytes(pem(ONE))
    assert CertificateReader(Root(tmp_path), ["/0"]).read().certificates == ()
    assert len(CertificateReader(Root(tmp_path), ["/8"]).read().certificates) == 1


def test_a_home_that_may_not_be_looked_into_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "home" / name).mkdir(parents=True)
        (tmp_path / "home" / name / "config").write_bytes(KUBECONFIG)
    readlink = os.readlink

    def squashed(path: str) -> str:  # as root on a disk of another machine
        if "/b/" in path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return readlink(path)

    monkeypatch.setattr(os, "readlink", squashed)
    found = CertificateReader(Root(tmp_path), ["/home/*/config"]).read()
    assert {c.path for c in found.certificates} >= {"/home/a/config", "/home/c/config"}
    assert found.errors == ()  # here it may be opened; there that is denied too, and said
