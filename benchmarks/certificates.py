"""What reading certificates costs: a scrape of 1,000 unchanged ones, and a cold start.

The yardsticks: 5 ms of CPU for the scrape, 1 s for the start, and openssl reading the same 1,000
from one file in one process, beside it. Run: `python -m benchmarks.certificates`. It ends with
status 1 where a limit is missed.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from exporter.collectors.certificates import CertificatesCollector
from exporter.config import Config

COUNT = 1000
SCRAPE_LIMIT = 0.005  # seconds of CPU
COLD_LIMIT = 1.0  # seconds


def make(folder: Path) -> Path:
    """COUNT certificates, a file each, and all of them in one bundle; the bundle."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
    now = datetime.now(UTC)
    bundle = []
    for number in range(COUNT):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(number + 1)
            .not_valid_before(now)
            .not_valid_after(now + timedelta(days=365))
            .add_extension(x509.BasicConstraints(False, None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        path = folder / f"{number:04}.crt"
        path.write_bytes(pem)
        os.utime(path, (1, 1))  # what was written a moment ago is read again each time
        bundle.append(pem)
    whole = folder / "bundle.pem"
    whole.write_bytes(b"".join(bundle))
    os.utime(folder, (1, 1))
    return whole


class _Collected(Collector):
    """Families as they are, for the encoder."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = make(folder)
        pattern = str(folder / "*.crt")
        collector = CertificatesCollector(
            Config(certificate_paths=(pattern,), node_name="benchmark")
        )
        begun = time.process_time()
        families = list(collector.collect())
        cold = time.process_time() - begun
        series = sum(len(family.samples) for family in families)
        warm = []
        for _ in range(50):
            begun = time.process_time()
            list(collector.collect())
            warm.append(time.process_time() - begun)
        encoding = []
        for _ in range(10):
            registry = CollectorRegistry()
            registry.register(_Collected(list(collector.collect())))
            begun = time.process_time()
            generate_latest(registry)
            encoding.append(time.process_time() - begun)
        begun_children = os.times().children_user + os.times().children_system
        subprocess.run(
            ["openssl", "storeutl", "-noout", "-text", "-certs", bundle],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        openssl = os.times().children_user + os.times().children_system - begun_children
    scrape = statistics.median(warm)
    print(f"{COUNT} certificates, {series} series")
    print(f"cold start        {cold * 1000:7.1f} ms of CPU (limit {COLD_LIMIT * 1000:.0f})")
    print(f"openssl, the same {openssl * 1000:7.1f} ms; ratio {cold / max(openssl, 0.001):.2f}")
    print(f"unchanged scrape  {scrape * 1000:7.2f} ms of CPU (limit {SCRAPE_LIMIT * 1000:.0f})")
    print(
        f"their text format {statistics.median(encoding) * 1000:7.2f} ms, prometheus-client's own"
    )
    return int(scrape > SCRAPE_LIMIT or cold > COLD_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
