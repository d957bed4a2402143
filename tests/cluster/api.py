"""The Kubernetes API over plain HTTPS with the credentials of a kubeconfig.

The test cluster must not depend on the client library that the product uses: a fault of that
library would then look like one of the cluster. It also starts in no time.
"""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]


class ApiError(RuntimeError):
    """The API server answered, and it was not a success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Api:
    """A client for one kubeconfig (its current context; embedded certificates or a token)."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        context = _named(config["contexts"], config["current-context"])["context"]
        cluster = _named(config["clusters"], context["cluster"])["cluster"]
        user = _named(config["users"], context["user"])["user"] or {}
        self.server: str = cluster["server"]
        self.headers = {"Accept": "application/json"}
        if token := user.get("token"):
            self.headers["Authorization"] = f"Bearer {token}"
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authorities = base64.b64decode(cluster["certificate-authority-data"])
        self.tls.load_verify_locations(cadata=authorities.decode())
        if "client-certificate-data" in user:
            with tempfile.NamedTemporaryFile() as both:  # the ssl module reads only files
                both.write(base64.b64decode(user["client-certificate-data"]) + b"\n")
                both.write(base64.b64decode(user["client-key-data"]))
                both.flush()
                self.tls.load_cert_chain(both.name)

    def text(self, path: str, *, timeout: float = 10) -> str:
        """GET as text, for /readyz and the like. Raises ApiError or OSError."""
        return self._send("GET", path, None, {}, timeout).decode()

    def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        content_type: str = "application/json",
        timeout: float = 30,
    ) -> Object:
        """One request with JSON both ways. Raises ApiError, or OSError where nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        answer = self._send(method, path, data, {"Content-Type": content_type}, timeout)
        decoded: Object = json.loads(answer)
        return decoded

    def _send(
        self,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
        timeout: float,
    ) -> bytes:
        request = urllib.request.Request(  # noqa: S310 - https, from our own kubeconfig
            self.server + path, data=data, method=method, headers={**self.headers, **headers}
        )
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.tls)
        )
        try:
            with opener.open(request, timeout=timeout) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, error.read().decode(errors="replace")[:1000]) from None


def _named(entries: list[Object], name: str) -> Object:
    return next(entry for entry in entries if entry["name"] == name)
