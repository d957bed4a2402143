"""Files of every odd shape, made by openssl and by cryptography: a right answer or a reason."""

import base64
import os
import random
import shutil
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.checks.certificates import CertificateReader, Root
from exporter.checks.certificates.files import MAX_BYTES
from exporter.checks.certificates.parsing import parse
from tests.cluster.pki import AUTHORITIES, LEAVES, Pki

NOW = datetime(2026, 1, 1, tzinfo=UTC)
_KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(
    *,
    name: str = "test",
    begins: datetime = NOW,
    ends: datetime = NOW + timedelta(days=90),
    serial: int = 0x1234,
    uses: list[x509.ObjectIdentifier] | None = None,
    ca: bool | None = None,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(_KEY.public_key())
        .serial_number(serial)
        .not_valid_before(begins)
        .not_valid_after(ends)
    )
    if uses is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    return builder.sign(_KEY, hashes.SHA256())


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def der(one: x509.Certificate) -> bytes:
    return one.public_bytes(serialization.Encoding.DER)


KEY_PEM = _KEY.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
)
ENCRYPTED_KEY = _KEY.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.BestAvailableEncryption(b"secret"),
)
ONE = certificate()
PFX = pkcs12.serialize_key_and_certificates(
    b"x", _KEY, ONE, None, serialization.BestAvailableEncryption(b"secret")
)


@pytest.mark.parametrize(
    ("data", "problem", "count"),
    [
        (pem(ONE), "", 1),
        (der(ONE), "", 1),
        (pem(ONE, certificate(serial=2), certificate(serial=3)), "", 3),
        (b"subject=CN = test\nbla\n" + pem(ONE) + b"trailing words\n", "", 1),
        (pem(ONE).replace(b"\n", b"\r\n"), "", 1),
        (KEY_PEM + pem(ONE), "", 1),
        (ENCRYPTED_KEY + pem(ONE), "", 1),
        (pem(ONE) + pem(ONE)[:200], "truncated", 1),
        (pem(ONE)[:-10], "truncated", 0),
        (pem(ONE)[:300], "truncated", 0),
        (der(ONE)[:-5], "truncated", 0),
        (der(ONE) + b"x", "malformed", 0),
        (pem(ONE).replace(b"M", b"*", 1), "malformed", 0),
        (pem(ONE).replace(b"MII", b"MIA", 1), "malformed", 0),
        (b"", "empty", 0),
        (b"\0" * 5000, "empty", 0),
        (b" \n\n", "empty", 0),
        (KEY_PEM, "no_certificate", 0),
        (ENCRYPTED_KEY, "encrypted", 0),
        (PFX, "encrypted", 0),
        (b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "malformed", 0),
        (b"-----BEGIN PKCS7-----\nAAAA\n-----END PKCS7-----\n", "unsupported", 0),
        (b"hello\n", "malformed", 0),
        (b"\xff\xfe\x00", "malformed", 0),
        (b"[" * 100_000, "malformed", 0),  # in a process that does not fall over
        (b"- " * 100_000, "malformed", 0),
        (b"-----BEGIN CERTIFICATE-----\n" * 50_000, "truncated", 0),
        (b"users: []\nclusters: []\n", "", 0),
        (b"users: {a: &a [*a]}\nclusters: 2001-99-99\n", "malformed", 0),
    ],
)
def test_what_a_file_holds(data: bytes, problem: str, count: int) -> None:
    contents = parse(data)
    assert (contents.problem, len(contents.certificates)) == (problem, count)


@pytest.mark.parametrize(
    ("uses", "ca", "usage"),
    [
        ([ExtendedKeyUsageOID.CLIENT_AUTH], None, "client"),
        ([ExtendedKeyUsageOID.SERVER_AUTH], False, "server"),
        ([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH], None, "client,server"),
        ([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE], None, "client,server"),
        (None, None, "client,server"),
        ([ExtendedKeyUsageOID.CODE_SIGNING], None, ""),
        ([ExtendedKeyUsageOID.CLIENT_AUTH], True, "ca"),
        (None, True, "ca"),
    ],
)
def test_usage(uses: list[x509.ObjectIdentifier] | None, usage: str, *, ca: bool | None) -> None:
    (found,) = parse(pem(certificate(uses=uses, ca=ca))).certificates
    assert found.usage == usage


@settings(max_examples=150, deadline=None)
@given(
    begins=st.datetimes(datetime(1950, 1, 1), datetime(9000, 1, 1)),  # noqa: DTZ001
    days=st.integers(0, 300_000),
    serial=st.integers(1, 2**158),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=16),
)
def test_dates_serials_and_names_are_what_was_signed(
    begins: datetime, days: int, serial: int, name: str
) -> None:
    begins = begins.replace(microsecond=0, tzinfo=UTC)
    ends = min(begins + timedelta(days=days), datetime(9999, 12, 31, tzinfo=UTC))
    one = certificate(begins=begins, ends=ends, serial=serial, name=name)
    (found,) = parse(pem(one)).certificates
    assert (found.not_before, found.not_after) == (begins.timestamp(), ends.timestamp())
    assert int(found.serial, 16) == serial
    assert found.subject == one.subject.rfc4514_string()
    assert parse(der(one)).certificates == (found,)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64), st.sampled_from(["flip", "cut", "insert"]))
def test_damaged_bytes_never_crash_and_never_lie_about_the_date(seed: int, how: str) -> None:
    chance = random.Random(seed)
    data = bytearray(chance.choice([pem(ONE), der(ONE), KUBECONFIG]))
    at = chance.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[at:]
    else:
        data[at:at] = chance.randbytes(chance.randrange(1, 40))
    contents = parse(bytes(data))
    for found in contents.certificates:
        if found.fingerprint == ONE.fingerprint(hashes.SHA256()).hex():
            assert found.not_after == (NOW + timedelta(days=90)).timestamp()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_give_an_answer(data: bytes) -> None:
    parse(data)
    parse(
        b"-----BEGIN CERTIFICATE-----\n" + base64.b64encode(data) + b"\n-----END CERTIFICATE-----"
    )


def kubeconfig(user: dict[str, str], cluster: dict[str, str]) -> bytes:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://127.0.0.1:1", **cluster}}],
        "users": [{"name": "u", "user": user}],
    }
    return yaml.safe_dump(document).encode()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


KUBECONFIG = kubeconfig(
    {"client-certificate-data": encoded(pem(ONE)), "client-key-data": encoded(KEY_PEM)},
    {"certificate-authority-data": encoded(pem(certificate(ca=True, serial=9)))},
)


def test_kubeconfig_embedded_and_by_reference(tmp_path: Path) -> None:
    folder = tmp_path / "etc/kubernetes"
    folder.mkdir(parents=True)
    (folder / "admin.conf").write_bytes(KUBECONFIG)
    (folder / "kubelet.conf").write_bytes(
        kubeconfig(
            {"client-certificate": "/var/lib/kubelet/pki/kubelet-client-current.pem"},
            {"certificate-authority": "ca.pem"},
        )
    )
    (folder / "ca.pem").write_bytes(pem(certificate(ca=True, serial=10)))
    pki = tmp_path / "var/lib/kubelet/pki"
    pki.mkdir(parents=True)
    (pki / "kubelet-client-2026.pem").write_bytes(pem(certificate(serial=11)) + KEY_PEM)
    # An absolute link: followed in the root, not in the root of whoever reads.
    (pki / "kubelet-client-current.pem").symlink_to("/var/lib/kubelet/pki/kubelet-client-2026.pem")
    inventory = CertificateReader(Root(tmp_path)).read()
    assert inventory.errors == ()
    assert {(c.path, c.serial, c.managed_by) for c in inventory.certificates} == {
        ("/etc/kubernetes/admin.conf", "1234", ""),  # no ca.key here: kubeadm can't renew it
        ("/etc/kubernetes/admin.conf", "09", ""),
        ("/etc/kubernetes/ca.pem", "0A", ""),
        ("/var/lib/kubelet/pki/kubelet-client-current.pem", "0B", "kubelet"),
    }


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.crt")
    (tmp_path / "dir.crt").mkdir()
    (tmp_path / "loop.crt").symlink_to("loop.crt")
    (tmp_path / "broken.crt").symlink_to("/nowhere")
    with (tmp_path / "huge.crt").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    (tmp_path / "empty.crt").touch()
    (tmp_path / "good.crt").write_bytes(pem(ONE))
    inventory = CertificateReader(Root(tmp_path), ["/*.crt", "/missing.pem"]).read()
    assert {(e.path, e.reason) for e in inventory.errors} == {
        ("/fifo.crt", "not_a_file"),
        ("/dir.crt", "not_a_file"),
        ("/loop.crt", "link_loop"),
        ("/broken.crt", "not_found"),
        ("/huge.crt", "too_large"),
        ("/empty.crt", "empty"),
        ("/missing.pem", "not_found"),
    }
    assert [c.path for c in inventory.certificates] == ["/good.crt"]


def test_links_do_not_lead_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.crt").write_bytes(pem(ONE))
    (root / "a.crt").symlink_to("../../../../../.." + str(tmp_path / "secret.crt"))
    (root / "b.crt").symlink_to(str(tmp_path / "secret.crt"))
    inventory = CertificateReader(Root(root), ["/*.crt"]).read()
    assert inventory.certificates == ()
    assert {e.reason for e in inventory.errors} == {"not_found"}


def test_defaults_that_are_not_there_are_no_error(tmp_path: Path) -> None:
    assert CertificateReader(Root(tmp_path)).read().errors == ()


def test_parsed_again_only_when_changed_and_always_then(tmp_path: Path) -> None:
    path = tmp_path / "a.crt"
    path.write_bytes(pem(certificate(serial=1)))
    os.utime(path, (1, 1))  # long ago, or it counts as just written and is read each time
    reader = CertificateReader(Root(tmp_path), ["/*.crt"])
    first = reader.read()
    assert reader.read() is first
    path.write_bytes(pem(certificate(serial=2)))  # same size, in place
    assert [c.serial for c in reader.read().certificates] == ["02"]
    other = tmp_path / "new"
    other.write_bytes(pem(certificate(serial=3)))
    other.rename(path)
    assert [c.serial for c in reader.read().certificates] == ["03"]
    path.unlink()
    assert reader.read().certificates == ()


def test_a_quiet_directory_is_looked_at_quickly_and_no_change_is_missed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.crt" for number in range(3)]
    for number, path in enumerate(paths, 1):
        path.write_bytes(pem(certificate(serial=number)))

    def quiet(*changed: Path) -> None:  # as if nothing had happened for long
        for path in changed or (*tmp_path.iterdir(), tmp_path):
            os.utime(path, (1, 1))

    def read() -> set[str]:
        reader.read()
        return {c.serial for c in reader.read().certificates}

    reader = CertificateReader(Root(tmp_path), ["/*.crt"])
    quiet()
    assert read() == {"01", "02", "03"}
    paths[0].write_bytes(pem(certificate(serial=4)))  # in place: the directory stays as it is
    quiet(paths[0])
    assert read() == {"04", "02", "03"}
    (tmp_path / "new").write_bytes(pem(certificate(serial=5)))
    (tmp_path / "new").rename(paths[1])
    quiet()
    assert read() == {"04", "05", "03"}
    paths[2].unlink()
    quiet()
    assert read() == {"04", "05"}
    (tmp_path / "other").write_bytes(pem(certificate(serial=6)))
    (tmp_path / "link.crt").symlink_to("other")
    quiet()
    assert read() == {"04", "05", "06"}
    (tmp_path / "other").write_bytes(pem(certificate(serial=7)))
    quiet()
    assert read() == {"04", "05", "07"}


def test_a_file_replaced_all_the_time_is_never_read_half(tmp_path: Path) -> None:
    path = tmp_path / "a.crt"
    versions = [pem(certificate(serial=n)) + b"x" * n * 50 for n in range(1, 9)]
    path.write_bytes(versions[0])
    stop = threading.Event()

    def replace() -> None:
        chance = random.Random(1)
        while not stop.is_set():
            new = tmp_path / "new"
            new.write_bytes(chance.choice(versions))
            new.rename(path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        reader = CertificateReader(Root(tmp_path), ["/a.crt"])
        for _ in range(300):
            inventory = reader.read()
            assert {e.reason for e in inventory.errors} <= {"changing"}
            assert len(inventory.certificates) + len(inventory.errors) == 1
    finally:
        stop.set()
        writer.join()


def test_two_certificates_of_one_name_stay_two(tmp_path: Path) -> None:
    (tmp_path / "a.crt").write_bytes(pem(certificate(serial=1), certificate(serial=2)))
    (tmp_path / "b.crt").write_bytes(pem(certificate(serial=1)))
    found = CertificateReader(Root(tmp_path), ["/*.crt"]).read().certificates
    assert [(c.path, c.serial) for c in found] == [
        ("/a.crt", "01"),
        ("/a.crt", "02"),
        ("/b.crt", "01"),
    ]


@pytest.mark.debian
def test_who_renews_what_kubeadm_made(pristine_pki: Pki, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(pristine_pki.rootfs, root)
    reader = CertificateReader(Root(root))
    managed = {c.name for c in reader.read().certificates if c.managed_by == "kubeadm"}
    assert managed == set(LEAVES) - {"kubelet.conf", "super-admin.conf"}
    assert not {c.name for c in reader.read().certificates if c.usage == "ca"} - {
        *AUTHORITIES,
        *LEAVES,
    }
    # An external etcd CA: what it signs is nobody's from the next reading on.
    (root / "etc/kubernetes/pki/etcd/ca.key").unlink()
    left = {c.name for c in reader.read().certificates if c.managed_by == "kubeadm"}
    assert managed - left == {n for n, (_, ca) in LEAVES.items() if ca == "etcd-ca"}


def test_kubespray_and_k3s_layouts(tmp_path: Path) -> None:
    for path, serial in (
        ("etc/kubernetes/ssl/apiserver.crt", 1),
        ("etc/kubernetes/ssl/ca.crt", 2),
        ("etc/ssl/etcd/ssl/member-node1.pem", 3),
        ("var/lib/rancher/k3s/server/tls/serving-kube-apiserver.crt", 4),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(pem(certificate(serial=serial, ca=serial == 2)))
    (tmp_path / "etc/kubernetes/ssl/ca.key").write_bytes(KEY_PEM)
    (tmp_path / "etc/ssl/etcd/ssl/member-node1-key.pem").write_bytes(KEY_PEM)
    (tmp_path / "etc/kubernetes/pki").symlink_to("ssl")
    inventory = CertificateReader(Root(tmp_path)).read()
    assert inventory.errors == ()
    assert {(c.name, c.managed_by) for c in inventory.certificates} == {
        ("apiserver", "kubeadm"),
        ("ca", ""),
        ("member-node1", "kubespray"),
        ("serving-kube-apiserver", "k3s"),
    }


@pytest.mark.parametrize("options", ["rsa:1024", "ed25519", "rsa:2048 -md5", "rsa:2048 -sha1"])
def test_what_openssl_makes_has_the_dates_openssl_reads(tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.crt"
    subject = "/C=DE/O=Two\\/Words + more/CN=*.example.com/emailAddress=a@b"
    files = ["-nodes", "-keyout", str(tmp_path / "k"), "-out", str(path)]
    command = ["openssl", "req", "-x509", *files, "-days", "77", "-subj", subject, "-newkey"]
    subprocess.run([*command, *options.split()], check=True, capture_output=True)
    wanted = ["-noout", "-enddate", "-serial", "-dateopt", "iso_8601"]
    said = subprocess.run(
        ["openssl", "x509", "-in", str(path), *wanted], check=True, capture_output=True, text=True
    ).stdout
    (found,) = parse(path.read_bytes()).certificates
    ends = datetime.fromtimestamp(found.not_after, UTC)
    assert f"notAfter={ends:%Y-%m-%d %H:%M:%SZ}" in said
    assert f"serial={found.serial}\n" in said
