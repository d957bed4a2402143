"""The exporter-toolkit web configuration: TLS, client certificates, basic auth.

The format of every Prometheus exporter, so that nobody learns another one. What of it Python's TLS
can't do is refused in words; a security option is never silently weaker than written.
"""

import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bcrypt
import msgspec
import yaml


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
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}


def load(path: Path) -> WebConfig:
    """Read and check the file; `WebConfigError` with one sentence."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WebConfigError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        raise WebConfigError(f"{path}{line} is not YAML") from None
    try:
        config = msgspec.convert({} if values is None else values, WebConfig)
    except msgspec.ValidationError as error:
        raise WebConfigError(f"{path}: {error}") from None
    for user, hashed in config.basic_auth_users.items():
        _check_hash(path, user, hashed)
    return config


def _check_hash(path: Path, user: str, hashed: str) -> None:
    """That it is one. Its own cost would hold up the event loop, for each user, at each reload."""
    cost = int(hashed[4:6]) if re.fullmatch(r"\$2[abxy]\$\d\d\$[./A-Za-z0-9]{53}", hashed) else 0
    if cost > 16:
        raise WebConfigError(f"{path}: basic_auth_users.{user}: a cost above 16 takes seconds")
    try:
        usable = cost >= 4 and ":" not in user
        bcrypt.checkpw(b"", f"{hashed[:4]}04{hashed[6:]}".encode())
    except ValueError:
        usable = False
    if not usable:
        raise WebConfigError(
            f"{path}: basic_auth_users.{user} is no bcrypt hash; make one by `htpasswd -nBC 10 ''`"
        )


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
        if not file.is_file():
            raise WebConfigError(f"tls_server_config: {file} is no file")
    try:
        # A key with a passphrase must not make OpenSSL ask for it on the terminal.
        context.load_cert_chain(certificate, key, password="")
        if config.cipher_suites:
            context.set_ciphers(":".join(_openssl_name(name) for name in config.cipher_suites))
    except (ssl.SSLError, OSError) as error:
        raise WebConfigError(
            f"tls_server_config: {certificate} and {key} can't be used: {_why(error)}"
        ) from None
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
    if config.curve_preferences:
        raise WebConfigError("tls_server_config.curve_preferences can't be set here; remove it")


def _openssl_name(name: str) -> str:
    """Go's name of a TLS 1.2 suite in OpenSSL's spelling."""
    exchange, _, cipher = name.removeprefix("TLS_").partition("_WITH_")
    cipher = re.sub(r"AES_(\d+)", r"AES\1", cipher).replace("_SHA256", "-SHA256")
    if "CHACHA20" in cipher:
        cipher = "CHACHA20-POLY1305"
    if not cipher:
        raise WebConfigError(f"tls_server_config.cipher_suites: {name} is unknown")
    return f"{exchange}-{cipher}".replace("_", "-").removeprefix("RSA-")


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "not PEM, or the key belongs to another certificate"
    return getattr(error, "strerror", None) or type(error).__name__


def peer_names(certificate: Mapping[str, Any]) -> list[str]:
    """Subject alternative names of a verified client certificate, as `ssl` decodes it."""
    return [str(value) for _, value in certificate.get("subjectAltName", ())]
