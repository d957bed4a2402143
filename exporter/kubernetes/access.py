"""How to reach an API server: read from a kubeconfig or from the pod's own service account.

The ordinary ways (client certificate, token, token file, basic auth, service account) are read
here, so that a broken file is explained in one sentence, a private key never lies in a temporary
file on disk, and the 40 MB of kubernetes_asyncio are paid only by those who need its credential
plug-ins (`exec`, `auth-provider`).
"""

import base64
import binascii
import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class AccessError(Exception):
    """The API can't be reached with what is configured; the sentence names the remedy."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Where an API server is and how to authenticate. Never log it."""

    server: str
    """Base URL without a trailing slash."""
    tls: ssl.SSLContext | None
    """None for plain http."""
    server_name: str = ""
    proxy: str = ""
    authorization: Callable[[], str]
    """The current Authorization header, or empty; read anew as tokens are rotated."""
    origin: str
    """What it was read from, for messages."""

    def __repr__(self) -> str:
        return f"Access({self.server} from {self.origin})"


def find_kubeconfig(explicit: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The kubeconfig to use: the named one, else $KUBECONFIG's first, else None.

    None with `in_cluster(environ)` true means the service account; otherwise there is no access.
    """
    if explicit is not None:
        return explicit
    if in_cluster(environ):
        return None
    names = [name for name in environ.get("KUBECONFIG", "").split(os.pathsep) if name]
    return Path(names[0]) if names else None


def in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether this process runs in a pod with a service account."""
    return bool(environ.get("KUBERNETES_SERVICE_HOST")) and (SERVICE_ACCOUNT / "token").exists()


def has_access(kubeconfig: Path | None, environ: Mapping[str, str]) -> bool:
    """Whether any access is configured, good or not."""
    return find_kubeconfig(kubeconfig, environ) is not None or in_cluster(environ)


def check_access(kubeconfig: Path | None, environ: Mapping[str, str]) -> None:
    """`AccessError` where a configured access can't be read; asks no server and no plug-in."""
    found = find_kubeconfig(kubeconfig, environ)
    if found is not None:
        _from_kubeconfig(found)
    elif in_cluster(environ):
        _from_service_account(environ)


async def load_access(kubeconfig: Path | None, environ: Mapping[str, str]) -> Access:
    """Read the access anew; `AccessError` where it can't be used."""
    found = find_kubeconfig(kubeconfig, environ)
    if found is not None:
        return _from_kubeconfig(found) or await _from_plugin(found)
    if in_cluster(environ):
        return _from_service_account(environ)
    raise AccessError("no access to a Kubernetes API: give --kubeconfig FILE or set KUBECONFIG")


def _from_service_account(environ: Mapping[str, str]) -> Access:
    host, port = environ["KUBERNETES_SERVICE_HOST"], environ.get("KUBERNETES_SERVICE_PORT", "443")
    host = f"[{host}]" if ":" in host else host
    token = SERVICE_ACCOUNT / "token"
    origin = f"the service account in {SERVICE_ACCOUNT}"
    return Access(
        server=f"https://{host}:{port}",
        tls=_tls(_read(SERVICE_ACCOUNT / "ca.crt", origin), origin),
        authorization=lambda: _bearer_of(token),
        origin=origin,
    )


def _from_kubeconfig(path: Path) -> Access | None:
    """None where a credential plug-in has to be asked."""
    origin = f"kubeconfig {path}"
    try:
        config = yaml.safe_load(_read(path, origin))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise AccessError(f"{origin} is not YAML{line}; write it anew") from None
    if not isinstance(config, dict):
        raise AccessError(f"{origin} is empty or not a kubeconfig; give another --kubeconfig")
    context = _named(config, "contexts", config.get("current-context"), "context", origin)
    cluster = _named(config, "clusters", context.get("cluster"), "cluster", origin)
    user = _named(config, "users", context["user"], "user", origin) if context.get("user") else {}
    server = str(cluster.get("server") or "").rstrip("/")
    if not server.startswith(("https://", "http://")):
        raise AccessError(f"{origin} has no server URL in its current cluster; add `server:`")
    if user.get("exec") or user.get("auth-provider"):
        return None
    tls = None
    if server.startswith("https://"):
        tls = _tls(
            _material(cluster, "certificate-authority", path, origin),
            origin,
            insecure=bool(cluster.get("insecure-skip-tls-verify")),
        )
        _client_certificate(tls, user, path, origin)
    return Access(
        server=server,
        tls=tls,
        server_name=str(cluster.get("tls-server-name") or ""),
        proxy=str(cluster.get("proxy-url") or ""),
        authorization=_authorization(user, path),
        origin=origin,
    )


async def _from_plugin(path: Path) -> Access:
    """Credentials that a program or an identity provider hands out: kubernetes_asyncio's part."""
    origin = f"kubeconfig {path}"
    from kubernetes_asyncio import config
    from kubernetes_asyncio.client import Configuration

    loaded = Configuration()
    try:
        await config.load_kube_config(
            config_file=str(path), client_configuration=loaded, persist_config=False
        )
    except Exception as error:  # noqa: BLE001 - plug-ins raise whatever they like
        raise AccessError(
            f"{origin}: its credential plug-in failed ({type(error).__name__}); "
            "run it by hand with kubectl"
        ) from None
    server, tls = str(loaded.host), None
    if server.startswith("https"):
        authority = _read(Path(loaded.ssl_ca_cert), origin) if loaded.ssl_ca_cert else b""
        tls = _tls(authority, origin, insecure=not loaded.verify_ssl)
        if loaded.cert_file:
            tls.load_cert_chain(loaded.cert_file, loaded.key_file)
    token = str(loaded.api_key.get("BearerToken", ""))
    return Access(server=server, tls=tls, authorization=lambda: token, origin=origin)


def _named(config: dict[str, Any], section: str, name: Any, part: str, origin: str) -> Any:
    if not name:
        raise AccessError(
            f"{origin} names no current {part}; choose one with kubectl config use-context"
        )
    for entry in config.get(section) or ():
        if isinstance(entry, dict) and entry.get("name") == name:
            found = entry.get(part) or {}
            if isinstance(found, dict):
                return found
    raise AccessError(f"{origin} has no {part} {name!r}; mend it or give another --kubeconfig")


def _read(path: Path, origin: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AccessError(
            f"can't read {path} ({error.strerror}) for {origin}; "
            "give a readable --kubeconfig, or run as a user who may read it"
        ) from None


def _material(section: dict[str, Any], key: str, path: Path, origin: str) -> bytes:
    """A PEM block given inline (`KEY-data`) or as a file relative to the kubeconfig."""
    if inline := section.get(f"{key}-data"):
        try:
            return base64.b64decode(str(inline), validate=True)
        except binascii.Error:
            raise AccessError(f"{origin}: {key}-data is not base64; write it anew") from None
    if name := section.get(key):
        return _read(path.parent / str(name), origin)
    return b""


def _tls(authority: bytes, origin: str, *, insecure: bool = False) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=authority.decode() if authority else None)
    except (ssl.SSLError, ValueError):
        raise AccessError(f"{origin}: its certificate authority is not a PEM certificate") from None
    # Python 3.13 demands extensions that the CAs of older kubeadm releases don't have; Go doesn't.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _client_certificate(
    context: ssl.SSLContext, user: dict[str, Any], path: Path, origin: str
) -> None:
    certificate = _material(user, "client-certificate", path, origin)
    key = _material(user, "client-key", path, origin)
    if not certificate and not key:
        return
    # OpenSSL reads keys from files only. A memory file never touches a disk and dies with us.
    descriptor = os.memfd_create("upkeep-client", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, certificate + b"\n" + key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    except ssl.SSLError:
        raise AccessError(
            f"{origin}: its client certificate and key are broken or don't belong together; "
            "write it anew (kubeadm kubeconfig user, or kubeadm certs renew)"
        ) from None
    finally:
        os.close(descriptor)


def _authorization(user: dict[str, Any], path: Path) -> Callable[[], str]:
    if user.get("tokenFile"):
        file = path.parent / str(user["tokenFile"])
        return lambda: _bearer_of(file)
    if user.get("token"):
        token = f"Bearer {user['token']}"
        return lambda: token
    if user.get("username"):
        pair = f"{user['username']}:{user.get('password', '')}".encode()
        basic = f"Basic {base64.b64encode(pair).decode()}"
        return lambda: basic
    return lambda: ""


def _bearer_of(file: Path) -> str:
    try:
        return f"Bearer {file.read_text().strip()}"
    except OSError as error:
        raise AccessError(f"can't read the token file {file} ({error.strerror})") from None
