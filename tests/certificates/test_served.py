"""What real TLS servers serve, read without a client certificate, whatever they think of us."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from exporter.checks.certificates.served import ProbeError, probe
from tests.certificates.test_reading import KEY_PEM, certificate, pem

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
EXPIRED = certificate(begins=LONG_AGO, ends=LONG_AGO + timedelta(days=1), serial=77)

Serve = Callable[..., str]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start `openssl s_server` with an expired, self-signed certificate; its host:port."""
    (tmp_path / "c.pem").write_bytes(pem(EXPIRED) + KEY_PEM)
    processes = []

    def start(*options: str) -> str:
        port = free_port()
        process = subprocess.Popen(
            ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", "c.pem", *options],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        processes.append(process)
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    return f"127.0.0.1:{port}"
            time.sleep(0.05)
        raise AssertionError("openssl s_server did not start")

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-tls1_3",),
        ("-tls1_2",),
        ("-tls1_3", "-Verify", "1", "-verify_return_error"),  # asks for a certificate, as etcd
        ("-tls1_2", "-Verify", "1", "-verify_return_error"),  # and turns us away before the end
        ("-cipher", "ALL:@SECLEVEL=0", "-tls1_2"),
    ],
)
def test_expired_untrusted_and_asking_for_a_client_certificate(
    serve: Serve, options: tuple[str, ...]
) -> None:
    served = probe(serve(*options), 10)
    assert served.certificate.serial == "4D"
    assert served.certificate.not_after == EXPIRED.not_valid_after_utc.timestamp()


def answering(answer: Callable[[socket.socket], None]) -> str:
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            answer(connection)

    threading.Thread(target=run, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def reason(endpoint: str, timeout: float = 10.0) -> str:
    with pytest.raises(ProbeError) as caught:
        probe(endpoint, timeout)
    return caught.value.reason


def test_who_does_not_serve() -> None:
    assert reason(f"127.0.0.1:{free_port()}") == "connection_refused"
    assert reason(answering(lambda c: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))) == "not_tls"
    assert reason(answering(lambda c: None)) == "not_tls"
    assert reason("no-such-host.invalid:443") == "unknown_host"


def _wait(event: threading.Event) -> None:
    event.wait(30)


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:https", f"127.0.0.1:{10**20}", f"{'a' * 64}.b:443", "x"]
)
def test_an_odd_flag_in_a_manifest_is_an_error_of_that_endpoint(endpoint: str) -> None:
    with pytest.raises(ProbeError) as error:
        probe(endpoint)
    assert error.value.reason == "unknown_host"


def test_a_server_that_says_nothing_is_given_up() -> None:
    over = threading.Event()
    begun = time.monotonic()
    assert reason(answering(lambda c: _wait(over)), 0.5) == "timeout"
    over.set()
    assert time.monotonic() - begun < 20


def test_endless_nonsense_is_cut_off() -> None:
    def babble(connection: socket.socket) -> None:
        record = b"\x16\x03\x03\x40\x00" + bytes(0x4000)
        try:
            while True:
                connection.sendall(record)
        except OSError:
            pass

    assert reason(answering(babble)) in ("not_tls", "timeout")


def test_a_broken_handshake_gives_the_certificate_it_showed(tmp_path: Path) -> None:
    """A server that sends its first flight in bits and hangs up: TLS 1.2 shows it in the clear."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    def answer(connection: socket.socket, folder: Path) -> None:
        (folder / "c.pem").write_bytes(pem(EXPIRED) + KEY_PEM)
        context.load_cert_chain(folder / "c.pem")
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(connection.recv(65536))
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            flight = outgoing.read()
        for at in range(0, len(flight), 7):
            connection.sendall(flight[at : at + 7])

    endpoint = answering(lambda c: answer(c, tmp_path))
    assert probe(endpoint, 10).certificate.serial == "4D"
