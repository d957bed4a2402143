"""etcd as Kubespray runs it: a systemd unit of the host, whose certificates kubeadm never renews.

A rotation therefore leaves it alone. Only where its files are newer than its process (Kubespray or
a restore has written them since) does it get a new one, from systemd.
"""

import asyncio
from pathlib import Path

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import Process, etcd_environment, read_process
from exporter.checks.certificates.layouts import is_key_file
from exporter.checks.certificates.parsing import parse
from remediator.fixes.certificates import commands
from remediator.fixes.certificates.backup import ETCD_DIRECTORY, Backup, read_files
from remediator.fixes.certificates.commands import CommandError, Completed
from remediator.fixes.certificates.restart import RestartError

UNIT = "etcd.service"
_FILES = (
    "cert-file",
    "key-file",
    "trusted-ca-file",
    "peer-cert-file",
    "peer-key-file",
    "peer-trusted-ca-file",
)
_ANSWER = 20.0  # seconds for systemd to say what it knows
_RESTART = 240.0  # seconds: an etcd of many gigabytes is slow to open its database
_TOLERANCE = 1.0  # seconds: start times are right to about that


def restorable_files(root: Root, backup: Backup, now: float) -> list[str]:
    """The paths of a backup that may be put back for this host's etcd. BackupError.

    All of its certificates and keys or none: none where its CA is another one by now, since the
    other members would not know it any more, or where one of them has expired.
    """
    kept = read_files(backup, lambda path: path.startswith(f"{ETCD_DIRECTORY}/"))
    authority = etcd_environment(root).get("trusted-ca-file", "")
    here = Path(root.resolve(authority)) if authority else None
    if here is None or (here.exists() and kept.get(authority) != here.read_bytes()):
        return []
    leafs = [parse(data) for path, data in kept.items() if not is_key_file(path)]
    ends = [certificate.not_after for leaf in leafs for certificate in leaf.certificates]
    return [] if min(ends, default=0.0) <= now else sorted(kept)


class HostEtcd:
    """The unit on this host."""

    def __init__(self, root: Root, procfs: Path, run: commands.Run = commands.run) -> None:
        self._root = root
        self._procfs = procfs
        self._run = run

    async def find(self) -> Process:
        """The unit's process. RestartError where there is none, or systemd does not know."""
        done = await self._systemctl("show", UNIT, "--property=MainPID", timeout=_ANSWER)
        name, _, value = done.output.strip().partition("=")
        if name != "MainPID" or not value.isdigit():
            raise RestartError("etcd", f"systemctl does not know {UNIT}: {done.output[-200:]}")
        process = await asyncio.to_thread(read_process, self._procfs, "etcd", int(value))
        if process is None:
            raise RestartError("etcd", f"{UNIT} does not run")
        return process

    def is_older_than_its_files(self, process: Process) -> bool:
        """Whether a certificate, key or CA that it reads was written after it started."""
        flags = etcd_environment(self._root)
        paths = [Path(self._root.resolve(flags[name])) for name in _FILES if flags.get(name)]
        written = [path.stat().st_mtime for path in paths if path.exists()]
        return process.started_at + _TOLERANCE < max(written, default=0.0)

    async def restart(self) -> None:
        """Have systemd restart it; it may not be healthy yet. RestartError."""
        done = await self._systemctl("restart", UNIT, timeout=_RESTART)
        if done.status != 0:
            raise RestartError("etcd", f"systemctl restart {UNIT} failed: {done.output[-300:]}")

    async def _systemctl(self, *arguments: str, timeout: float) -> Completed:  # noqa: ASYNC109
        if self._root.resolve("/") != "/":
            raise RestartError(
                "etcd", f"etcd is {UNIT} of the host, which can be asked on the host itself only"
            )
        try:
            return await self._run(["systemctl", *arguments], timeout)
        except CommandError as error:
            raise RestartError("etcd", f"{UNIT} can't be asked about: {error}") from None
