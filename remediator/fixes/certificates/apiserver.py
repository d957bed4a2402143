"""The API server as a rotation sees it: with this node's own admin.conf, read anew each time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import manifest_flags
from exporter.kubernetes.access import Access, AccessError, load_access
from exporter.kubernetes.client import ApiError, Client

_TIMEOUT = 10.0  # seconds for one answer


class ApiServer:
    """One request a connection: certificates and server processes change in between."""

    def __init__(self, root: Root) -> None:
        self._root = root

    async def ready(self) -> bool:
        """Whether this node's own API server says it's ready."""
        try:
            return await self._send("GET", "/readyz", local=True) == b"ok"
        except (ApiError, AccessError):
            return False

    async def get(self, path: str) -> Any:
        """An object, or None where there is none. ApiError, AccessError."""
        try:
            return msgspec.json.decode(await self._send("GET", path))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def write(self, method: str, path: str, body: Mapping[str, Any]) -> Any:
        """Create or replace an object. ApiError (409: somebody else was first), AccessError."""
        return msgspec.json.decode(await self._send(method, path, body=body))

    async def _send(
        self, method: str, path: str, *, body: Any = None, local: bool = False
    ) -> bytes:
        admin = Path(self._root.resolve("/etc/kubernetes/admin.conf"))

        async def load() -> Access:
            access = await load_access(admin, {})
            here = self._local() if local else ""
            return msgspec.structs.replace(access, server=here) if here else access

        async with Client(load, request_timeout=_TIMEOUT) as client:
            return await client.send(method, path, body=body)

    def _local(self) -> str:
        flags = manifest_flags(self._root, "kube-apiserver")
        host = flags.get("advertise-address", "")
        if not host:
            return ""
        return f"https://{f'[{host}]' if ':' in host else host}:{flags.get('secure-port', '6443')}"
