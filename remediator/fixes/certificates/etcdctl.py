"""etcd by its own client, for where its HTTP gateway is off (or older than the paths we know).

The gateway needs nothing on the host and comes first. What etcdctl says and writes is the same, so
it is checked the same way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from exporter.checks.certificates import Root
from remediator.fixes.certificates import commands
from remediator.fixes.certificates.commands import CommandError, Completed

_PATHS = ("/usr/local/bin/etcdctl", "/usr/bin/etcdctl", "/opt/bin/etcdctl", "/opt/etcd/etcdctl")
_ANSWER = 15.0  # seconds for one answer
_SNAPSHOT = 900.0  # seconds for a whole database, of 8 GiB at most


class EtcdctlError(Exception):
    """There is no etcdctl, or it failed; the sentence has its last words."""


class Etcdctl:
    """etcdctl of the host, for this node's own etcd. All paths are the host's."""

    def __init__(
        self,
        root: Root,
        run: commands.Run,
        *,
        endpoint: str,
        ca: str,
        certificate: str,
        key: str,
    ) -> None:
        """endpoint: host:port."""
        self._root = root
        self._run = run
        self._flags = (
            f"--endpoints=https://{endpoint}",
            f"--cacert={root.resolve(ca)}",
            f"--cert={root.resolve(certificate)}",
            f"--key={root.resolve(key)}",
        )

    async def ask(self, *words: str) -> Any:
        """Its answer to a question, decoded. EtcdctlError."""
        done = await self._etcdctl([*words, "--write-out=json"], _ANSWER)
        for line in reversed(done.output.splitlines()):  # warnings may stand before it
            try:
                return msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue
        raise EtcdctlError(f"etcdctl {' '.join(words)} did not answer in JSON")

    async def save(self, target: Path) -> None:
        """Write a snapshot to a new file, as seen from here. EtcdctlError."""
        await self._etcdctl(["snapshot", "save", str(target)], _SNAPSHOT)

    async def _etcdctl(self, words: Sequence[str], timeout: float) -> Completed:  # noqa: ASYNC109
        program = next((path for path in _PATHS if self._root.exists(path)), "")
        if not program:
            raise EtcdctlError(f"there is no etcdctl in {', '.join(_PATHS)} either")
        try:
            done = await self._run([self._root.resolve(program), *words, *self._flags], timeout)
        except CommandError as error:
            raise EtcdctlError(str(error)) from None
        if done.status != 0:
            last = (done.output.splitlines() or [""])[-1]
            raise EtcdctlError(f"etcdctl {' '.join(words[:2])} failed: {last[-300:]}")
        return done
