"""The exporter-toolkit web configuration: TLS, client certificates, basic auth.

The format of every Prometheus exporter, so that nobody learns another one. What of it Python's TLS
can't do is refused in words; a security option is never silently weaker than written.
"""

import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bcrypt
import msgspec

from exporter.yaml_source import ConfigError, Source, read_source


class WebConfigError(Exception):
    """The web configuration can't be used; the sentence names the file, the option, the remedy."""


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`tls_server_config`. Paths are relative to the file's folder."""

    cert_file: str = ""
    key_file: str = ""
    client_auth_type: str = ""
    client_ca_file: str = ""
    client_allowed_sans: tuple[str, ...] = ()
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    cipher_suites: tuple[str, ...] = ()
    prefer_server_cipher_suites: bool = True
    curve_preferences: tuple[str, ...] = ()


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`http_server_config`; http2 is accepted and not used."""

    http2: bool = True
    headers: dict[str, str] = {}


class WebConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    tls_server_config: TlsConfig | None = None
    http_server_config: HttpConfig = HttpConfig()
    basic_auth_users: dict[str, str] = {}


_CLIENT_AUTH = {
    "": ssl.CERT_NONE,
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}


def load(path: Path) -> WebConfig:
    """Read and check the file; `WebConfigError` with one sentence."""
    try:
        source = read_source(path)
        config = source.convert(source.value, WebConfig, "$")
        for user, hashed in config.basic_auth_users.items():
            _check_hash(source, user, hashed)
        for name, value in config.http_server_config.headers.items():
            if not _HEADER.fullmatch(name) or not _VALUE.fullmatch(value):
                below = f"$.http_server_config.headers.{name}"
                raise source.error(below, "no header can be called so, or hold this")
    except ConfigError as error:
        raise WebConfigError(str(error)) from None
    return config


def _check_hash(source: Source, user: str, hashed: str) -> None:
    """That it is one. Its own cost would hold up the event loop, for each user, at each reload."""
    where = f"$.basic_auth_users.{user}"
    cost = int(hashed[4:6]) if re.fullmatch(r"\$2[abxy]\$\d\d\$[./A-Za-z0-9]{53}", hashed) else 0
    if cost > 16:
        raise source.error(where, "a cost above 16 takes seconds")
    try:
        usable = cost >= 4 and ":" not in user
        bcrypt.checkpw(b"", f"{hashed[:4]}04{hashed[6:]}".encode())
    except ValueError:
        usable = False
    if not usable:
        raise source.error(where, "this is no bcrypt hash; make one by `htpasswd -nBC 10 ''`")


def tls_context(config: TlsConfig, folder: Path) -> ssl.SSLContext:
    """The server's TLS context; `WebConfigError` where a file or an option can't be used."""
    _refuse_unsupported(config)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[config.min_version]
    context.maximum_version = _VERSIONS[config.max_version]
    if config.prefer_server_cipher_suites:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    certificate, key = folder / config.cert_file, folder / config.key_file
    for file in (certificate, key):
        if not os.path.isfile(file):  # noqa: PTH113 - never raises, whatever may be read
            raise WebConfigError(f"tls_server_config: {file} is no file")
    try:
        # A key with a passphrase must not make OpenSSL ask for it on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise WebConfigError(
            f"tls_server_config: {certificate} and {key} can't be used: {_why(error)}"
        ) from None
    if config.cipher_suites:
        context.set_ciphers(":".join(_openssl_name(name) for name in config.cipher_suites))
    context.verify_mode = _CLIENT_AUTH[config.client_auth_type]
    if config.client_ca_file:
        authority = folder / config.client_ca_file
        try:
            context.load_verify_locations(authority)
        except (ssl.SSLError, OSError) as error:
            raise WebConfigError(
                f"tls_server_config.client_ca_file: {authority} can't be used: {_why(error)}"
            ) from None
    return context


def _refuse_unsupported(config: TlsConfig) -> None:
    if not config.cert_file or not config.key_file:
        raise WebConfigError("tls_server_config needs both cert_file and key_file")
    if config.client_auth_type not in _CLIENT_AUTH:
        known = ", ".join(name for name in _CLIENT_AUTH if name)
        raise WebConfigError(
            f"tls_server_config.client_auth_type {config.client_auth_type!r} can't be had here; "
            f"one of {known} can"
        )
    wants = _CLIENT_AUTH[config.client_auth_type] is not ssl.CERT_NONE
    if wants != bool(config.client_ca_file):
        raise WebConfigError(
            "tls_server_config: client_auth_type and client_ca_file go together; give both"
        )
    if config.client_allowed_sans and not wants:
        raise WebConfigError("tls_server_config: client_allowed_sans needs a client_auth_type")
    for option, version in (("min", config.min_version), ("max", config.max_version)):
        if version not in _VERSIONS:
            raise WebConfigError(f"tls_server_config.{option}_version: one of TLS12, TLS13")
    if _VERSIONS[config.min_version] > _VERSIONS[config.max_version]:
        raise WebConfigError("tls_server_config: no version is between min_version and max_version")
    if config.curve_preferences:
        raise WebConfigError("tls_server_config.curve_preferences can't be set here; remove it")


def _openssl_name(name: str) -> str:
    """Go's name of a TLS 1.2 suite in OpenSSL's spelling."""
    exchange, _, cipher = name.removeprefix("TLS_").partition("_WITH_")
    cipher = re.sub(r"AES_(\d+)", r"AES\1", cipher).replace("_CBC", "")
    if "CHACHA20" in cipher:
        cipher = "CHACHA20-POLY1305"
    found = f"{exchange}-{cipher}".replace("_", "-").removeprefix("RSA-")
    try:
        # Alone: of several, OpenSSL passes over those that it doesn't know.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(found if cipher else "")
    except ssl.SSLError:
        raise WebConfigError(
            f"tls_server_config.cipher_suites: {name} is no suite of TLS 1.2 that can be had here"
        ) from None
    return found


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "not PEM, or the key belongs to another certificate"
    return getattr(error, "strerror", None) or type(error).__name__


def peer_names(certificate: Mapping[str, Any]) -> list[str]:
    """Subject alternative names of a verified client certificate, as `ssl` decodes it."""
    return [spelt(str(value)) for _, value in certificate.get("subjectAltName", ())]


def spelt(name: str) -> str:
    """The one spelling of an address; any other name as it is."""
    try:
        return str(ipaddress.ip_address(name.strip()))
    except ValueError:
        return name
