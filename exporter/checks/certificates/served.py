"""What certificate a TLS endpoint serves now, whether or not it's valid, without a key of ours.

etcd and others ask for a client certificate and turn us away for having none. That doesn't matter:
in TLS 1.3 the server's certificate has been read by then, and in TLS 1.2 it went over the wire
unencrypted, so it's taken from the handshake itself.
"""

import errno
import socket
import ssl
import time
from collections.abc import Callable, Iterator

import msgspec

from exporter.checks.certificates.parsing import MalformedError, Parsed, parse_certificate

_RECORD_HANDSHAKE = 22
_MESSAGE_CERTIFICATE = 11
_MAX_HANDSHAKE = 256 * 1024  # bytes; real ones are a few KiB


class ProbeError(Exception):
    """The endpoint served no certificate."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """`connection_refused`, `timeout`, `unreachable`, `unknown_host` or `not_tls`."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint serves."""

    endpoint: str
    certificate: Parsed


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def probe(
    endpoint: str,
    timeout: float = 3.0,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    connect: Callable[..., socket.socket] = socket.create_connection,
) -> Served:
    """Read the certificate that `host:port` serves; gives up after `timeout` seconds in all.

    Raises ProbeError.
    """
    ends = monotonic() + timeout
    try:
        connection = connect(split_endpoint(endpoint), timeout=timeout)
    except TimeoutError:
        raise ProbeError("timeout", f"no answer from {endpoint} in {timeout:g} s") from None
    except socket.gaierror as error:
        raise ProbeError("unknown_host", f"{endpoint}: {error.strerror}") from None
    except (ValueError, OverflowError):  # no number, or too large a one; a name that is none
        raise ProbeError("unknown_host", f"{endpoint} is no host and port") from None
    except OSError as error:
        refused = error.errno == errno.ECONNREFUSED
        reason = "connection_refused" if refused else "unreachable"
        raise ProbeError(reason, f"{endpoint}: {error.strerror or error}") from None
    with connection:
        der = _handshake(connection, endpoint, ends, monotonic)
    try:
        return Served(endpoint=endpoint, certificate=parse_certificate(der))
    except MalformedError:
        raise ProbeError("not_tls", f"{endpoint} served what is no X.509 certificate") from None


def _context() -> ssl.SSLContext:
    """Accepts whatever is served: it's to be read, not trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def _handshake(
    connection: socket.socket, endpoint: str, ends: float, monotonic: Callable[[], float]
) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = _context().wrap_bio(incoming, outgoing)
    received = bytearray()
    try:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                _exchange(connection, incoming, outgoing, received, ends - monotonic())
        der = tls.getpeercert(binary_form=True)
    except TimeoutError:
        der = certificate_in_handshake(bytes(received))
        if der is None:
            raise ProbeError("timeout", f"{endpoint} did not finish its handshake") from None
    except OSError:  # SSLError is one: turned away, or no TLS at all
        der = certificate_in_handshake(bytes(received))
    if der is None:
        raise ProbeError("not_tls", f"{endpoint} does not speak TLS") from None
    return der


def _exchange(
    connection: socket.socket,
    incoming: ssl.MemoryBIO,
    outgoing: ssl.MemoryBIO,
    received: bytearray,
    left: float,
) -> None:
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)
    if outgoing.pending:
        connection.sendall(outgoing.read())
    data = connection.recv(16384)
    if not data or len(received) + len(data) > _MAX_HANDSHAKE:
        raise ConnectionError("the handshake ended early")
    received += data
    incoming.write(data)


def certificate_in_handshake(received: bytes) -> bytes | None:
    """The server's own certificate (DER) from the plain part of a TLS 1.2 handshake, if any."""
    for kind, body in _messages(received):
        if kind == _MESSAGE_CERTIFICATE and len(body) > 6:
            length = int.from_bytes(body[3:6], "big")
            der = body[6 : 6 + length]
            return der if len(der) == length else None
    return None


def _messages(received: bytes) -> Iterator[tuple[int, bytes]]:
    """The handshake messages of the leading plain records; a message may span records."""
    stream = bytearray()
    at = 0
    while at + 5 <= len(received) and received[at] == _RECORD_HANDSHAKE:
        length = int.from_bytes(received[at + 3 : at + 5], "big")
        stream += received[at + 5 : at + 5 + length]
        at += 5 + length
    at = 0
    while at + 4 <= len(stream):
        length = int.from_bytes(stream[at + 1 : at + 4], "big")
        if at + 4 + length > len(stream):
            return
        yield stream[at], bytes(stream[at + 4 : at + 4 + length])
        at += 4 + length
