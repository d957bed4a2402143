"""Bytes of a file to certificates: PEM with chains, DER, and kubeconfigs.

cryptography parses X.509. What is here finds the certificates in a file and says in one word what
is wrong where there are none. Private keys are passed over undecoded in PEM files; in a kubeconfig
they are text nodes that go with the parsed document. Nothing of them is returned or put in words.
"""

import base64
import binascii
import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import msgspec
import yaml
from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID

MAX_FOUND = 256
"""Certificates of one file, and files named in it: every CA of the web is 140."""
_MAX_NAME = 512  # characters; real names are a tenth of it, and a label value goes into every query
_MAX_PATH = 4096
_PEM_BEGIN = b"-----BEGIN "
_PEM_END = b"-----END "
_CERTIFICATE_LABELS = (b"CERTIFICATE", b"X509 CERTIFICATE", b"TRUSTED CERTIFICATE")
_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_MAX_DEPTH = 40  # a kubeconfig has 4 levels, a pod 12


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one certificate, without the place it came from."""

    serial: str
    subject: str
    issuer: str
    usage: str
    not_before: float
    not_after: float
    fingerprint: str


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a kubeconfig names instead of holding the certificate."""

    path: str


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds. `problem` is a reason code where some of it can't be used."""

    certificates: tuple[Parsed, ...] = ()
    references: tuple[Reference, ...] = ()
    problem: str = ""


class MalformedError(ValueError):
    """These bytes are no certificate. Carries no part of them."""


def parse(data: bytes) -> Contents:
    """Find the certificates in a file's bytes; never raises for what they are."""
    if not data.strip(b"\0 \t\r\n"):
        return Contents(problem="empty")
    if _PEM_BEGIN in data:
        return _parse_pem(data)
    if data[:1] == b"\x30" and not data[1:2].isalnum():
        return _parse_der(data)
    return _parse_kubeconfig(data)


def parse_certificate(der: bytes) -> Parsed:
    """The facts of one DER certificate. MalformedError where it isn't one."""
    try:
        with warnings.catch_warnings():
            # Old certificates with odd serials or names are told of, not complained about.
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            certificate = x509.load_der_x509_certificate(der)
            serial = f"{certificate.serial_number:X}"
            return Parsed(
                serial=serial if len(serial) % 2 == 0 else "0" + serial,
                subject=_name(certificate.subject),
                issuer=_name(certificate.issuer),
                usage=_usage(certificate),
                not_before=certificate.not_valid_before_utc.timestamp(),
                not_after=certificate.not_valid_after_utc.timestamp(),
                fingerprint=hashlib.sha256(der).hexdigest(),
            )
    except (ValueError, TypeError, OverflowError, x509.InvalidVersion) as error:
        raise MalformedError(f"not an X.509 certificate ({type(error).__name__})") from None


def pem_blocks(data: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """Each PEM block's label and body; the body is None where the block has no end."""
    at = data.find(_PEM_BEGIN)
    stop = data.find(_PEM_END)
    while at >= 0:
        label_end = data.find(b"-----", at + len(_PEM_BEGIN))
        if 0 <= stop < label_end:  # looked for again only then: or many beginnings take for ever
            stop = data.find(_PEM_END, label_end)
        if label_end < 0 or stop < 0:
            yield data[at + len(_PEM_BEGIN) : max(label_end, 0) or at + 80].strip(), None
            return
        label = data[at + len(_PEM_BEGIN) : label_end]
        following = data.find(_PEM_BEGIN, label_end)
        if -1 < following < stop:
            yield label, None
        else:
            whole = data.startswith(_PEM_END + label + b"-----", stop)
            yield label, data[label_end + 5 : stop] if whole else None
        at = following


def _parse_pem(data: bytes) -> Contents:
    found: list[Parsed] = []
    problem = ""
    labels = set()
    for label, body in pem_blocks(data):
        labels.add(label)
        if label not in _CERTIFICATE_LABELS:
            continue
        if body is None:
            problem = problem or "truncated"
            continue
        if len(found) == MAX_FOUND:
            problem = "too_many"
            break
        try:
            der = base64.b64decode(b"".join(body.split()), validate=True)
            if label == b"TRUSTED CERTIFICATE":
                der = _first_element(der)  # OpenSSL's own trust settings follow it
            found.append(parse_certificate(der))
        except (binascii.Error, MalformedError):
            problem = problem or "malformed"
    if not found and not problem:
        problem = _why_none(data, labels)
    return Contents(certificates=tuple(found), problem=problem)


def _why_none(data: bytes, labels: set[bytes]) -> str:
    if b"ENCRYPTED PRIVATE KEY" in labels or b"Proc-Type: 4,ENCRYPTED" in data:
        return "encrypted"
    if b"PKCS7" in labels or b"CERTIFICATE REQUEST" in labels:
        return "unsupported"
    return "no_certificate"


def _parse_der(data: bytes) -> Contents:
    try:
        return Contents(certificates=(parse_certificate(data),))
    except MalformedError:
        if _declared_length(data) > len(data):
            return Contents(problem="truncated")
        if data[4:7] == b"\x02\x01\x03":  # PFX version 3: PKCS#12
            return Contents(problem="encrypted")
        return Contents(problem="malformed")


def _declared_length(data: bytes) -> int:
    """How long the first DER element says it is, its header included."""
    if len(data) < 2:
        return 2
    first = data[1]
    if first < 0x80:
        return 2 + first
    count = first & 0x7F
    return 2 + count + int.from_bytes(data[2 : 2 + count], "big")


def _first_element(data: bytes) -> bytes:
    return data[: _declared_length(data)]


def load_yaml(data: bytes) -> Any:
    """A YAML (or JSON) document, every scalar as text. MalformedError where it's none.

    The C loader descends by recursion and takes the process with it where somebody nests deeply:
    so the depth is measured first, on the event stream, which costs no stack.
    """
    try:
        depth = 0
        for event in yaml.parse(data, Loader=_LOADER):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > _MAX_DEPTH:
                raise MalformedError("YAML nested too deeply")
        return yaml.load(data, Loader=_LOADER)  # noqa: S506 - a base loader makes only text
    except (yaml.YAMLError, ValueError, RecursionError):
        raise MalformedError("not YAML") from None


def _parse_kubeconfig(data: bytes) -> Contents:
    try:
        document = load_yaml(data)
    except MalformedError:
        return Contents(problem="malformed")
    if not isinstance(document, dict) or not ({"clusters", "users"} & document.keys()):
        return Contents(problem="malformed")
    found: list[Parsed] = []
    references: list[Reference] = []
    problem = ""
    for entries, entry_kind, key in (
        ("users", "user", "client-certificate"),
        ("clusters", "cluster", "certificate-authority"),
    ):
        for body in _entries(document.get(entries), entry_kind):
            if len(found) + len(references) >= MAX_FOUND:
                problem = "too_many"
                break
            embedded, file = body.get(f"{key}-data"), body.get(key)
            if isinstance(embedded, str) and embedded:  # it goes before the file, as in kubectl
                contents = _parse_embedded(embedded)
                found.extend(contents.certificates)
                problem = problem or contents.problem
            elif isinstance(file, str) and file:
                if "\0" in file or len(file) > _MAX_PATH:  # no system call takes it
                    problem = problem or "malformed"
                else:
                    references.append(Reference(path=file))
    return Contents(
        certificates=tuple(found[:MAX_FOUND]), references=tuple(references), problem=problem
    )


def _entries(entries: object, kind: str) -> Iterator[dict[str, Any]]:
    for entry in entries if isinstance(entries, list) else ():
        body = entry.get(kind) if isinstance(entry, dict) else None
        if isinstance(body, dict):
            yield body


def _parse_embedded(text: str) -> Contents:
    try:
        data = base64.b64decode("".join(text.split()).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        return Contents(problem="malformed")
    if _PEM_BEGIN not in data:
        return Contents(problem="malformed")
    return _parse_pem(data)


def _name(name: x509.Name) -> str:
    text = name.rfc4514_string()
    return text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 1] + "…"


def _usage(certificate: x509.Certificate) -> str:
    """What it is for; empty where its extensions can't be read or name neither use."""
    try:
        extensions = certificate.extensions
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return ""
    try:
        if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return "ca"
    except x509.ExtensionNotFound:
        pass
    try:
        uses = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return "client,server"  # RFC 5280: without the extension every use is allowed
    if ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in uses:
        return "client,server"
    parts = []
    if ExtendedKeyUsageOID.CLIENT_AUTH in uses:
        parts.append("client")
    if ExtendedKeyUsageOID.SERVER_AUTH in uses:
        parts.append("server")
    return ",".join(parts)
