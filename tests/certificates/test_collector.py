"""The metrics as Prometheus gets them, from a real PKI and a real TLS server."""

import asyncio
import io
import json
import os
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry, Metric

from deploy.local.debian import binary
from exporter import report
from exporter.collectors.certificates import CertificatesCollector
from exporter.config import Config
from tests.certificates.conftest import MakePki
from tests.certificates.test_reading import certificate, pem
from tests.certificates.test_served import Serve, free_port, serve
from tests.cluster.pki import Pki

__all__ = ["serve"]  # a fixture

MANIFEST = """
apiVersion: v1
kind: Pod
metadata: {name: kube-apiserver, namespace: kube-system}
spec:
  containers:
  - command:
    - kube-apiserver
    - --secure-port=PORT
    - --tls-cert-file=/etc/kubernetes/pki/apiserver.crt
"""


def collector(rootfs: Path, **options: object) -> CertificatesCollector:
    config = Config(rootfs=rootfs, node_name="node-1", **options)  # type: ignore[arg-type]
    return CertificatesCollector(config, interval=0.2)


def families(one: CertificatesCollector) -> dict[str, Metric]:
    return {family.name: family for family in one.collect()}


def text(one: CertificatesCollector) -> str:
    class Registry(CollectorRegistry):
        def collect(self) -> list[Metric]:
            return list(one.collect())

    return generate_latest(Registry()).decode()


@pytest.mark.debian
@pytest.mark.cluster
def test_promtool_has_nothing_to_say_but_the_days(make_pki: MakePki) -> None:
    pki = make_pki()
    (pki.directory / "scheduler.conf").write_text("garbage\n")
    checked = subprocess.run(
        [binary("promtool"), "check", "metrics"],
        input=text(collector(pki.rootfs)),
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in (checked.stdout + checked.stderr).splitlines() if line.strip()]
    assert complaints == [
        'upkeep_certificate_expiry_days use base unit "seconds" instead of "days"'
    ]


@pytest.mark.debian
@pytest.mark.cluster
def test_dates_labels_and_errors(make_pki: MakePki) -> None:
    pki = make_pki({"apiserver": timedelta(days=-2), "etcd-ca": timedelta(days=20)})
    real = pki.certificates()
    (pki.directory / "scheduler.conf").write_text("garbage\n")
    found = families(collector(pki.rootfs))
    days = {s.labels["path"]: s for s in found["upkeep_certificate_expiry_days"].samples}
    sample = days["/etc/kubernetes/pki/apiserver.crt"]
    assert sample.value == pytest.approx(-2, abs=0.01)
    assert sample.labels == {
        "node": "node-1",
        "path": "/etc/kubernetes/pki/apiserver.crt",
        "name": "apiserver",
        "serial": f"{real['apiserver'].serial_number:X}".zfill(
            2 * ((real["apiserver"].serial_number.bit_length() + 7) // 8)
        ),
        "subject": "CN=kube-apiserver",
        "issuer": "CN=kubernetes",
        "usage": "server",
        "managed_by": "kubeadm",
    }
    etcd_ca = days["/etc/kubernetes/pki/etcd/ca.crt"]
    assert (etcd_ca.labels["usage"], etcd_ca.labels["managed_by"]) == ("ca", "")
    for name, which in (
        ("not_after", "not_valid_after_utc"),
        ("not_before", "not_valid_before_utc"),
    ):
        family = found[f"upkeep_certificate_{name}_timestamp_seconds"]
        values = {s.labels["path"]: s.value for s in family.samples}
        exact = getattr(real["apiserver"], which).timestamp()
        assert values["/etc/kubernetes/pki/apiserver.crt"] == exact
    errors = [s.labels for s in found["upkeep_certificate_read_errors"].samples]
    assert errors == [
        {"node": "node-1", "path": "/etc/kubernetes/scheduler.conf", "reason": "malformed"}
    ]


def test_series_are_unique_whatever_the_files_say(tmp_path: Path) -> None:
    same = {"name": "x", "serial": 5}
    one = certificate(**same)  # type: ignore[arg-type]
    other = certificate(ends=one.not_valid_before_utc + timedelta(days=3), **same)  # type: ignore[arg-type]
    (tmp_path / "a.crt").write_bytes(pem(one, other, one))
    samples = families(collector(tmp_path, certificate_paths=("/*.crt",)))[
        "upkeep_certificate_not_after_timestamp_seconds"
    ].samples
    assert [s.value for s in samples] == [other.not_valid_after_utc.timestamp()]  # the sooner end


def test_days_are_counted_to_the_minute(tmp_path: Path) -> None:
    ends = datetime(2030, 1, 2, tzinfo=UTC)
    file = tmp_path / "a.crt"
    file.write_bytes(pem(certificate(ends=ends)))
    config = Config(rootfs=tmp_path, certificate_paths=("/*.crt",))
    now = [0.0]
    reading = CertificatesCollector(config, clock=lambda: now[0])

    def days(left: float) -> list[float]:
        now[0] = ends.timestamp() - left
        samples = families(reading)["upkeep_certificate_expiry_days"].samples
        return [sample.value * 1440 for sample in samples]  # in minutes

    assert [*days(86400 - 59.9), *days(86340), *days(86460), *days(-60)] == pytest.approx(
        [1440, 1439, 1441, -1]
    )
    file.write_bytes(pem(certificate(ends=ends + timedelta(days=1))))  # within that minute
    assert days(-61) == pytest.approx([1439])


def test_file_names_that_are_no_text_do_not_fail_the_scrape(tmp_path: Path) -> None:
    for name, data in ((b"\xff.crt", pem(certificate())), (b"\xfe.crt", b"garbage")):
        (tmp_path / os.fsdecode(name)).write_bytes(data)
    (tmp_path / "\\udcfe.crt").write_bytes(b"garbage")  # reads the same: one series of both
    lines = text(collector(tmp_path, certificate_paths=("/*.crt",))).splitlines()
    days = [line for line in lines if line.startswith("upkeep_certificate_expiry_days{")]
    assert len(days) == 1
    assert 'path="/\\\\udcff.crt"' in days[0]
    errors = [line for line in lines if line.startswith("upkeep_certificate_read_errors{")]
    assert len(errors) == 1
    assert 'path="/\\\\udcfe.crt"' in errors[0]


def control_plane(rootfs: Path, port: int) -> None:
    manifests = rootfs / "etc/kubernetes/manifests"
    manifests.mkdir(parents=True, exist_ok=True)
    (manifests / "kube-apiserver.yaml").write_text(MANIFEST.replace("PORT", str(port)))


@pytest.mark.debian
@pytest.mark.cluster
async def test_served_and_stale_until_the_server_has_the_new_one(
    make_pki: MakePki, serve: Serve
) -> None:
    pki = make_pki()
    path = pki.directory / "pki/apiserver"
    files = ("-cert", str(path.with_suffix(".crt")), "-key", str(path.with_suffix(".key")))
    endpoint = serve(*files)
    control_plane(pki.rootfs, int(endpoint.rpartition(":")[2]))
    one = collector(pki.rootfs)
    await one.start()
    try:
        assert await stale(one) == 0.0
        served = families(one)["upkeep_certificate_served_not_after_timestamp_seconds"].samples
        assert [(s.labels["endpoint"], s.labels["name"]) for s in served] == [
            (endpoint, "apiserver")
        ]
        assert served[0].value == pki.certificates()["apiserver"].not_valid_after_utc.timestamp()
        resign(pki)
        assert await stale(one, want=1.0) == 1.0  # openssl read its files when it started
    finally:
        await one.aclose()
    renewed = serve(*files)
    control_plane(pki.rootfs, int(renewed.rpartition(":")[2]))
    one.observe()
    assert [s.value for s in families(one)["upkeep_certificate_stale"].samples] == [0.0]


def resign(pki: Pki) -> None:
    from tests.cluster.pki import set_remaining

    set_remaining(pki.directory, {"apiserver": timedelta(days=300)})


async def stale(one: CertificatesCollector, want: float = 0.0) -> float:
    deadline = time.monotonic() + 30
    while True:
        samples = families(one)["upkeep_certificate_stale"].samples
        if (samples and samples[0].value == want) or time.monotonic() > deadline:
            return samples[0].value
        await asyncio.sleep(0.1)


@pytest.mark.debian
@pytest.mark.cluster
def test_what_does_not_answer_is_an_error_and_its_gauges_absent(make_pki: MakePki) -> None:
    pki = make_pki()
    port = free_port()
    control_plane(pki.rootfs, port)
    one = collector(pki.rootfs)
    one.observe()
    found = families(one)
    assert found["upkeep_certificate_served_not_after_timestamp_seconds"].samples == []
    assert found["upkeep_certificate_stale"].samples == []
    assert [s.labels for s in found["upkeep_certificate_read_errors"].samples] == [
        {"node": "node-1", "path": f"127.0.0.1:{port}", "reason": "connection_refused"}
    ]


@pytest.mark.debian
@pytest.mark.cluster
def test_c20_no_key_in_any_output(make_pki: MakePki) -> None:
    pki = make_pki()
    keys = b"".join(p.read_bytes() for p in pki.directory.rglob("*.key"))
    secrets = {line for line in keys.decode().splitlines() if not line.startswith("-")}
    for path in pki.directory.glob("*.conf"):
        for line in path.read_text().splitlines():
            if "client-key-data" in line:
                secrets.add(line.split()[1][:200])
    for path in pki.directory.rglob("*.key"):  # read as certificates: refused, and not quoted
        path.with_suffix(".crt").write_bytes(path.read_bytes()[:-30])
    one = collector(pki.rootfs)
    said = io.StringIO()
    report.write(one.report(), "table", said)
    report.write(one.report(), "json", said)
    output = said.getvalue() + text(one)
    assert "truncated" in output or "no_certificate" in output
    assert not [secret for secret in secrets if secret and secret in output]


@pytest.mark.debian
@pytest.mark.cluster
def test_the_table_has_what_ends_first_on_top_and_escapes_names(
    make_pki: MakePki, tmp_path: Path
) -> None:
    pki = make_pki({"apiserver": timedelta(days=9), "etcd-server": timedelta(hours=-30)})
    evil = certificate(name="\x1b[2Jevil\n\u202e")
    (pki.directory / "pki/evil.crt").write_bytes(pem(evil))
    found = collector(pki.rootfs).report()
    said = io.StringIO()
    report.write(found, "table", said)
    lines = said.getvalue().splitlines()
    assert lines[0].startswith("NAME")
    first = [line.split()[0] for line in lines[1:4]]
    assert first.index("etcd-server") < first.index("apiserver")
    assert "expired 30.0 h ago" in said.getvalue()
    assert "\x1b" not in said.getvalue()
    assert "\u202e" not in said.getvalue()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    coloured = Terminal()
    report.write(found, "table", coloured)
    assert "\x1b[31m" in coloured.getvalue()

    as_json = io.StringIO()
    report.write(found, "json", as_json)
    names = {entry["name"]: entry for entry in json.loads(as_json.getvalue())["findings"]}
    assert names["apiserver"]["expiry_days"] == pytest.approx(9, abs=0.01)
