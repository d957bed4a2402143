"""etcd over its HTTP gateway, which needs nothing on the host: health, members, and a snapshot.

Where the gateway is off, etcdctl is asked the same.
"""

import asyncio
import base64
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import (
    endpoint_of,
    etcd_environment,
    manifest_flags,
)
from remediator.fixes.certificates import commands
from remediator.fixes.certificates.etcdctl import Etcdctl, EtcdctlError
from remediator.fixes.certificates.snapshot import Snapshot, SnapshotError, read_snapshot

_MEMBERS = "/v3/cluster/member/list"
_STATUS = "/v3/maintenance/status"
_TIMEOUT = 10.0  # seconds for one answer


class EtcdError(Exception):
    """etcd did not answer as it should; the sentence says what was asked of whom."""


class GatewayOffError(EtcdError):
    """etcd answers, but has no such path."""


class EtcdAccess(msgspec.Struct, frozen=True, kw_only=True):
    """How this node's own etcd is reached. Paths are the host's."""

    endpoint: str
    """host:port of a client URL."""
    ca: str
    certificate: str
    key: str


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One of the cluster's members."""

    name: str
    client_urls: tuple[str, ...]
    is_learner: bool


def find_access(root: Root, pki: str) -> EtcdAccess | None:
    """How to reach the etcd that runs on this node; None where none does."""
    flags = manifest_flags(root, "etcd")
    if flags:
        return EtcdAccess(
            endpoint=endpoint_of(flags.get("listen-client-urls", "")),
            ca=flags.get("trusted-ca-file", f"{pki}/etcd/ca.crt"),
            certificate=f"{pki}/etcd/healthcheck-client.crt",
            key=f"{pki}/etcd/healthcheck-client.key",
        )
    host = etcd_environment(root)
    if not host:
        return None
    own = etcd_environment(root, prefix="ETCDCTL_")
    return EtcdAccess(
        endpoint=endpoint_of(host.get("listen-client-urls", "")),
        ca=own.get("cacert") or own.get("ca-file") or host.get("trusted-ca-file", ""),
        certificate=own.get("cert") or own.get("cert-file") or host.get("cert-file", ""),
        key=own.get("key") or own.get("key-file") or host.get("key-file", ""),
    )


class Etcd:
    """A client. It reads its certificate anew for each use: a renewal replaces it."""

    def __init__(self, root: Root, access: EtcdAccess, run: commands.Run = commands.run) -> None:
        self._root = root
        self._access = access
        self._etcdctl = Etcdctl(
            root,
            run,
            endpoint=access.endpoint,
            ca=access.ca,
            certificate=access.certificate,
            key=access.key,
        )

    async def healthy(self, url: str = "") -> bool:
        """Whether a member says it's healthy (it then has a leader). url: ours where empty."""
        return not await self._complaint(url)

    async def _complaint(self, url: str) -> str:
        """What a member says is wrong with it, such as `ALARM NOSPACE`; empty where it's well."""
        try:
            async with self._session() as session, session.get(self._url(url, "/health")) as answer:
                document = msgspec.json.decode(await answer.read())
        except (aiohttp.ClientError, TimeoutError, OSError, EtcdError, msgspec.DecodeError):
            return "no answer"
        if not isinstance(document, dict):
            return "no answer"
        if str(document.get("health")).lower() == "true":
            return ""
        return str(document.get("reason") or "not healthy")[:100]

    async def members(self) -> tuple[Member, ...]:
        """Every member, as the quorum knows it. EtcdError."""
        document = await self._ask(_MEMBERS, "member", "list")
        found = tuple(
            Member(
                name=str(member.get("name", "")),
                client_urls=tuple(member.get("clientURLs") or ()),
                is_learner=bool(member.get("isLearner", False)),
            )
            for member in document.get("members") or ()
        )
        if not found:
            raise EtcdError("etcd lists no members")
        return found

    async def unhealthy(self, members: Sequence[Member]) -> tuple[str, ...]:
        """The names of those that are not healthy, with what is wrong."""

        async def complaint(member: Member) -> str:
            said = await asyncio.gather(*map(self._complaint, member.client_urls))
            if "" in said:
                return ""
            return f"{member.name or 'an unstarted member'} ({(said or ['not started'])[0]})"

        return tuple(filter(None, await asyncio.gather(*map(complaint, members))))

    async def status(self) -> dict[str, Any]:
        """This member's own account of itself: version, dbSize, leader … EtcdError."""
        return await self._ask(_STATUS, "endpoint", "status")

    async def _ask(self, path: str, *words: str) -> dict[str, Any]:
        """The gateway's answer, else etcdctl's to the same question. EtcdError."""
        try:
            return await self._post(path)
        except GatewayOffError as off:
            try:
                answer = await self._etcdctl.ask(*words)
            except EtcdctlError as error:
                raise EtcdError(f"{off}; {error}") from None
        if isinstance(answer, list):  # one for each endpoint, and there is one
            answer = answer[0].get("Status") if answer and isinstance(answer[0], dict) else None
        if not isinstance(answer, dict):
            raise EtcdError(f"etcdctl {' '.join(words)} did not answer with an object")
        return answer

    async def snapshot(self, target: Path) -> Snapshot:
        """Write a snapshot to a new file (0600) and check it. EtcdError, OSError (a full disk)."""
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            try:
                status = await self._post(_STATUS)
                by = "gateway"
                async for blob in self._stream():
                    file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            except GatewayOffError:
                status = await self.status()
                by = "etcdctl"
                await self._save(target)
        size = int(status.get("dbSize") or 0)
        try:
            return await asyncio.to_thread(read_snapshot, target, database_size=size, by=by)
        except SnapshotError as error:
            raise EtcdError(f"the snapshot of etcd is not whole: {error}") from None

    async def _save(self, target: Path) -> None:
        try:
            await self._etcdctl.save(target)  # by a rename over the empty file, mode 0600 too
        except EtcdctlError as error:
            raise EtcdError(str(error)) from None

    async def _stream(self) -> AsyncIterator[bytes]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=60)
        url = self._url("", "/v3/maintenance/snapshot")
        rest = b""
        try:
            async with (
                self._session(timeout) as session,
                session.post(url, data=b"{}") as answer,
            ):
                if answer.status != 200:
                    raise EtcdError(f"{url} answered {answer.status}")
                async for data in answer.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        yield _blob(line)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EtcdError(f"{url} broke off ({type(error).__name__})") from None
        if rest.strip():
            yield _blob(rest)

    async def _post(self, path: str) -> dict[str, Any]:
        url = self._url("", path)
        try:
            async with self._session() as session, session.post(url, data=b"{}") as answer:
                data = await answer.read()
                if answer.status == 404:
                    raise GatewayOffError(f"{url} is not there; is etcd's gRPC gateway off?")
                if answer.status != 200:
                    raise EtcdError(f"{url} answered {answer.status}")
                document = msgspec.json.decode(data)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
            raise EtcdError(f"{url} can't be reached: {why}") from None
        except msgspec.DecodeError:
            raise GatewayOffError(f"{url} did not answer in JSON; is the gateway off?") from None
        if not isinstance(document, dict):
            raise EtcdError(f"{url} did not answer with an object")
        return document

    def _url(self, base: str, path: str) -> str:
        return (base.rstrip("/") or f"https://{self._access.endpoint}") + path

    def _session(self, timeout: aiohttp.ClientTimeout | None = None) -> aiohttp.ClientSession:
        access = self._access
        try:
            tls = ssl.create_default_context(cafile=self._root.resolve(access.ca))
            tls.verify_flags &= ~ssl.VERIFY_X509_STRICT  # older CAs lack extensions it demands
            tls.load_cert_chain(
                self._root.resolve(access.certificate), self._root.resolve(access.key)
            )
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise EtcdError(f"{access.certificate} can't be used to reach etcd: {why}") from None
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls),
            timeout=timeout or aiohttp.ClientTimeout(total=_TIMEOUT),
        )


def _blob(line: bytes) -> bytes:
    try:
        message = msgspec.json.decode(line)
        if "error" in message:
            raise EtcdError("etcd broke the snapshot off")
        return base64.b64decode(message["result"].get("blob", ""))
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError, ValueError):
        raise EtcdError("etcd sent what is no part of a snapshot") from None


def quorum_problem(members: Sequence[Member], unhealthy: Sequence[str]) -> str:
    """Why a member must not be restarted now, in a sentence; empty where it may be."""
    if unhealthy:
        return (
            f"etcd members not healthy: {', '.join(unhealthy)} of {len(members)}; restarting one "
            "more could cost the quorum"
        )
    if learners := [member.name for member in members if member.is_learner]:
        return f"etcd members still being added: {', '.join(learners)}; wait for their promotion"
    return ""
