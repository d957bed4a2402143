"""The PKI is what kubeadm makes, with the dates that were wanted, and kubeadm can renew it."""

from __future__ import annotations

import base64
import os
import re
import shutil
import ssl
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from tests.cluster.kubernetes_build import Binaries
from tests.cluster.pki import AUTHORITIES, LEAVES, Pki, kubeadm_pki, set_remaining
from tests.cluster.processes import ClusterError

pytestmark = [pytest.mark.debian, pytest.mark.cluster]

CLUSTER_LEAVES = set(LEAVES) - {"super-admin.conf"}  # that one came with 1.29
RENEWED = CLUSTER_LEAVES - {"kubelet.conf"}


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return kubeadm_pki(tmp_path / "node")


def expirations(pki: Pki) -> dict[str, tuple[str, str]]:
    """What `kubeadm certs check-expiration` says: name -> (EXPIRES, RESIDUAL TIME)."""
    line = re.compile(r"^(\S+) +(\w{3} \d\d, \d{4} \d\d:\d\d UTC) +(\S+) ", re.MULTILINE)
    return {
        name: (expires, residual)
        for name, expires, residual in line.findall(pki.kubeadm("certs", "check-expiration"))
    }


def left(certificate: x509.Certificate) -> timedelta:
    return certificate.not_valid_after_utc - datetime.now(UTC)


def about(wanted: timedelta) -> tuple[timedelta, timedelta]:
    return wanted - timedelta(minutes=10), wanted + timedelta(minutes=1)


def test_every_leaf_ends_when_wanted_and_kubeadm_sees_it_so(tmp_path: Path) -> None:
    pki = kubeadm_pki(tmp_path, remaining=timedelta(days=5, hours=1))
    certificates = pki.certificates()
    assert set(certificates) == CLUSTER_LEAVES | set(AUTHORITIES)
    seen = expirations(pki)
    assert set(seen) == RENEWED | set(AUTHORITIES)
    low, high = about(timedelta(days=5, hours=1))
    for name in CLUSTER_LEAVES:
        assert low < left(certificates[name]) < high
    for name in RENEWED:
        ends = certificates[name].not_valid_after_utc
        assert seen[name] == (ends.strftime("%b %d, %Y %H:%M UTC"), "5d")
    for name in AUTHORITIES:
        assert left(certificates[name]) > timedelta(days=3000)
        assert (
            certificates[name].not_valid_before_utc
            <= certificates["apiserver"].not_valid_before_utc
        )


def test_single_ones_and_authorities_may_have_their_own_dates(tmp_path: Path) -> None:
    wanted = {
        "admin.conf": timedelta(days=-3),
        "etcd-server": timedelta(hours=2),
        "ca": timedelta(days=20, hours=1),
    }
    pki = kubeadm_pki(tmp_path, remaining=wanted, lifetime=timedelta(days=90))
    certificates = pki.certificates()
    for name, value in wanted.items():
        low, high = about(value)
        assert low < left(certificates[name]) < high, name
        lasts = certificates[name].not_valid_after_utc - certificates[name].not_valid_before_utc
        assert lasts >= timedelta(days=90)
    assert left(certificates["apiserver"]) > timedelta(days=360)
    seen = expirations(pki)
    assert seen["admin.conf"][1] == "<invalid>"
    assert seen["ca"][1] == "20d"


def test_only_dates_and_serial_differ_from_kubeadms_own(pki: Pki) -> None:
    before = pki.certificates()
    modes = {path: path.stat().st_mode for path in pki.directory.rglob("*")}
    set_remaining(pki.directory, timedelta(days=1))
    after = pki.certificates()
    for name in CLUSTER_LEAVES:
        old, new = before[name], after[name]
        assert old.serial_number != new.serial_number
        assert old.not_valid_after_utc != new.not_valid_after_utc
        assert (old.subject, old.issuer, old.version) == (new.subject, new.issuer, new.version)
        assert type(old.signature_hash_algorithm) is type(new.signature_hash_algorithm)
        assert old.public_key() == new.public_key()
        assert list(old.extensions) == list(new.extensions)
        new.verify_directly_issued_by(after[LEAVES[name][1]])
    assert {path: path.stat().st_mode for path in pki.directory.rglob("*")} == modes


def test_openssl_accepts_chain_and_key(tmp_path: Path) -> None:
    pki = kubeadm_pki(tmp_path, remaining={"ca": timedelta(days=9), "apiserver": timedelta(days=1)})
    folder = pki.directory / "pki"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "apiserver.crt", folder / "apiserver.key")
    authority = (folder / "ca.crt").read_text()
    client = ssl.create_default_context(cadata=authority)
    shake_hands(client, server, "kubernetes.default.svc")
    admin = yaml.safe_load((pki.directory / "admin.conf").read_text())
    embedded = admin["clusters"][0]["cluster"]["certificate-authority-data"]
    assert base64.b64decode(embedded).decode() == authority


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].version() is not None


@pytest.mark.parametrize("remaining", [timedelta(days=5), timedelta(days=-5)])
def test_kubeadm_renews_them(tmp_path: Path, remaining: timedelta) -> None:
    pki = kubeadm_pki(tmp_path, remaining=remaining)
    before = pki.certificates()
    said = pki.kubeadm("certs", "renew", "all")
    assert "Done renewing certificates" in said
    after = pki.certificates()
    for name in RENEWED:
        assert after[name].serial_number != before[name].serial_number, name
        assert left(after[name]) > timedelta(days=364), name
    for name in {"kubelet.conf", *AUTHORITIES}:
        assert after[name] == before[name], name


def test_kubeadm_renews_a_single_one(pki: Pki) -> None:
    before = pki.certificates()
    pki.kubeadm("certs", "renew", "scheduler.conf")
    after = pki.certificates()
    assert {name for name in after if after[name] != before[name]} == {"scheduler.conf"}


def test_unknown_name_and_folder_in_use_are_refused(pki: Pki) -> None:
    before = pki.certificates()
    with pytest.raises(ClusterError, match="no certificate apisever in "):
        set_remaining(pki.directory, {"apisever": timedelta(1), "apiserver": timedelta(1)})
    assert pki.certificates() == before
    with pytest.raises(ClusterError, match="is there already"):
        kubeadm_pki(pki.rootfs)


@pytest.mark.root
def test_an_ordinary_user_can_renew_too(open_folder: Path) -> None:
    pki = kubeadm_pki(open_folder / "node")
    for path in [open_folder, *open_folder.rglob("*")]:
        os.chown(path, 65534, 65534)
    programs = open_folder / "programs"
    programs.mkdir(mode=0o755)
    shutil.copy(pki.binaries.kubeadm, programs)  # the cache may be in root's home

    def as_nobody() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        Pki(pki.rootfs, Binaries(programs, pki.binaries.version)).kubeadm("certs", "renew", "all")

    before = pki.certificates()
    child = os.fork()
    if child == 0:
        try:
            as_nobody()
        except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    after = pki.certificates()
    assert {name for name in after if after[name] != before[name]} == RENEWED


def test_kubeadms_own_words_are_in_the_error(pki: Pki) -> None:
    (pki.directory / "pki/etcd/ca.key").unlink()
    with pytest.raises(ClusterError, match=r"(?s)certs renew all.*etcd"):
        pki.kubeadm("certs", "renew", "all")


def test_nothing_of_the_machine_is_touched(tmp_path: Path) -> None:
    def state() -> list[tuple[str, float]]:
        return [(str(p), p.stat().st_mtime) for p in sorted(Path("/etc/kubernetes").rglob("*"))]

    before = state()
    pki = kubeadm_pki(tmp_path, remaining=timedelta(days=5))
    pki.kubeadm("certs", "renew", "all")
    assert state() == before
