"""What reading certificates costs: a scrape of 1,000 unchanged ones, and a cold start.

The yardsticks: 5 ms of CPU for the scrape, 1 s for the start, and openssl reading the same 1,000
from one file in one process, beside it. Run: `python -m benchmarks.certificates`. It ends with
status 1 where a limit is missed.
"""

import asyncio
import contextlib
import gzip
import http.client
import os
import socket
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
from prometheus_client.exposition import choose_encoder

from exporter.collectors.certificates import CertificatesCollector
from exporter.config import Config
from exporter.exposition import Families, gzip_of, text_of
from exporter.server import Scraper

COUNT = 1000
SCRAPE_LIMIT = 0.005  # seconds of CPU
COLD_LIMIT = 1.0  # seconds
SCRAPES = 200
INTERVAL = 15.0  # seconds between scrapes, by the collector's clock
ACCEPT = (  # what Prometheus 3 asks for
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


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


async def in_process(config: Config) -> tuple[float, float, float]:
    """Seconds of CPU of a scrape each 15 s: its text, its gzip, and the library's encoding of it.

    Means, because three of four such scrapes find the days of a minute written already.
    """
    encode, _ = choose_encoder(ACCEPT)
    now = [time.time()]
    scraper = Scraper({"certificates": CertificatesCollector(config, clock=lambda: now[0])})
    await scraper.start()
    spent: dict[str, list[float]] = {"text": [], "gzip": [], "library": []}
    for write in (text_of, gzip_of):
        for number in range(2 + SCRAPES):
            now[0] += INTERVAL
            begun = time.process_time()
            families = await scraper.scrape()
            answer = write(encode, families)
            used = time.process_time() - begun
            if number >= 2:
                spent["text" if write is text_of else "gzip"].append(used)
        for _ in range(5):
            begun = time.process_time()
            same = encode(Families(families))
            spent["library"].append(time.process_time() - begun)
        assert same == (answer if write is text_of else gzip.decompress(answer))
    await scraper.aclose()
    text, packed, library = (statistics.mean(one) for one in spent.values())
    return text, packed, library


def over_http(pattern: str) -> dict[str, tuple[float, int]]:
    """By encoding: the exporter's CPU seconds for a scrape as Prometheus asks for it, and bytes.

    They come faster than a minute passes: the days are hardly ever written anew here.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    exporter = subprocess.Popen(
        [
            *(sys.executable, "-m", "exporter", f"--web.listen-address=127.0.0.1:{port}"),
            *("--no-collector.zombies", "--no-collector.rollouts", "--log.level=error"),
            f"--certificates.path={pattern}",
        ]
    )
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        deadline = time.monotonic() + 30
        while exporter.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError):
                connection.connect()
                break
            time.sleep(0.1)
        result = {}
        for coding in ("gzip", "identity"):
            _scraped(connection, coding, 3)
            before = _used(exporter.pid)
            size = _scraped(connection, coding, SCRAPES)
            used = _used(exporter.pid) - before
            result[coding] = used / SCRAPES, size
        return result
    finally:
        exporter.terminate()
        exporter.wait()


def _scraped(connection: http.client.HTTPConnection, coding: str, times: int) -> int:
    for _ in range(times):
        connection.request("GET", "/metrics", headers={"Accept": ACCEPT, "Accept-Encoding": coding})
        answer = connection.getresponse()
        size = len(answer.read())
        assert answer.status == 200
        assert answer.headers.get("Content-Encoding", "identity") == coding
    return size


def _used(pid: int) -> float:
    """Seconds of CPU of all of a process's threads, in user space and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = make(folder)
        pattern = str(folder / "*.crt")
        config = Config(certificate_paths=(pattern,), node_name="benchmark")
        collector = CertificatesCollector(config)
        begun = time.process_time()
        families = list(collector.collect())
        cold = time.process_time() - begun
        series = sum(len(family.samples) for family in families)
        collecting = []
        for _ in range(50):
            begun = time.process_time()
            list(collector.collect())
            collecting.append(time.process_time() - begun)
        scrape, packed, library = asyncio.run(in_process(config))
        served = over_http(pattern)
        begun_children = os.times().children_user + os.times().children_system
        subprocess.run(
            ["openssl", "storeutl", "-noout", "-text", "-certs", bundle],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        openssl = os.times().children_user + os.times().children_system - begun_children
    print(f"{COUNT} certificates, {series} series; milliseconds of CPU")
    print(f"cold start          {cold * 1000:7.1f} (limit {COLD_LIMIT * 1000:.0f})")
    print(f"openssl, the same   {openssl * 1000:7.1f}; ratio {cold / max(openssl, 0.001):.2f}")
    print(f"unchanged, collect  {statistics.median(collecting) * 1000:7.2f}")
    limit = f"(limit {SCRAPE_LIMIT * 1000:.0f})"
    print(f"each {INTERVAL:.0f} s, as text   {scrape * 1000:7.2f} {limit}")
    print(f"each {INTERVAL:.0f} s, gzip      {packed * 1000:7.2f} {limit}")
    print(f"  library's encoder {library * 1000:7.2f} for the same text alone")
    for coding, (seconds, size) in served.items():
        print(f"  HTTP, {coding:8}    {seconds * 1000:7.2f} for {size} bytes, the whole process")
    return int(max(scrape, packed) > SCRAPE_LIMIT or cold > COLD_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
