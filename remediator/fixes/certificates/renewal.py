"""Whether a renewal came out whole, and putting back what did not."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.checks.certificates import Root
from exporter.checks.certificates.layouts import PKI_DIRECTORIES
from exporter.checks.certificates.parsing import parse
from exporter.checks.cgroups import parse_membership
from remediator.fixes.certificates.backup import Backup, BackupError, put_back, read_files
from remediator.fixes.certificates.layout import Layout, PairError, check_pair, read_layout
from remediator.host import start_time
from remediator.model import CheckError, FixError, Steps

ROLL_BACK = "roll back"


class RenewalError(Exception):
    """A renewal that did not come out whole."""


def check_renewed(root: Root, before: Layout, now: float) -> Layout:
    """The layout after a renewal that came out whole. RenewalError, CheckError where not."""
    after = read_layout(root)
    if missing := sorted(before.serials.keys() - after.serials.keys()):
        raise RenewalError(f"gone after the renewal: {', '.join(missing)}")
    for old in before.pairs:
        new = next(pair for pair in after.pairs if pair.name == old.name)
        if new.certificate.serial == old.certificate.serial:
            raise RenewalError(f"{old.name} was not renewed")
        if new.certificate.not_after <= max(old.certificate.not_after, now):
            raise RenewalError(f"{old.name} does not live longer than before")
    for pair in after.pairs:
        try:
            check_pair(root, pair)
        except PairError as error:
            raise RenewalError(str(error)) from None
    return after


def is_whole(root: Root, layout: Layout, old: Mapping[str, str], now: float) -> bool:
    """Whether every certificate is another than the old one, alive, and fits its key."""
    new = layout.serials
    if new.keys() != old.keys() or any(new[name] == old[name] for name in old):
        return False
    if any(pair.certificate.remaining(now) <= 0 for pair in layout.pairs):
        return False
    try:
        for pair in layout.pairs:
            check_pair(root, pair)
    except PairError:
        return False
    return True


async def await_kubeadm(procfs: Path, timeout: float) -> None:  # noqa: ASYNC109
    """Wait for the end of a `kubeadm certs renew` that outlived its remediator, or end it.

    Until then the files are its own: what it would still write must not be taken for the result.
    timeout: seconds after which its remediator would have ended it.
    """
    ends = time.monotonic() + timeout
    while (found := await asyncio.to_thread(_renewing, procfs)) is not None:
        pid, started = found
        if time.monotonic() > ends:
            with contextlib.suppress(ProcessLookupError):
                process = os.pidfd_open(pid)
                try:
                    if start_time(pid, procfs) == started:  # held by now, it can't be another
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                finally:
                    os.close(process)
        await asyncio.sleep(0.2)


def _renewing(procfs: Path) -> tuple[int, int] | None:
    """Pid and start time of the host's own kubeadm. A tenant may call a process anything, but it is
    in a container."""
    for entry in os.scandir(procfs):
        if not entry.name.isdigit():
            continue
        try:
            words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            if b"renew" not in words or not any(w.rsplit(b"/")[-1] == b"kubeadm" for w in words):
                continue
            contained = parse_membership(Path(entry.path, "cgroup").read_bytes()).container
            if contained is not None or Path(entry.path).stat().st_uid != 0:
                continue
            started = start_time(int(entry.name), procfs)
        except OSError:
            continue
        if started is not None:
            return int(entry.name), started
    return None


async def roll_back(
    root: Root, backup: Backup, steps: Steps, *, name: str = ROLL_BACK, **data: Any
) -> Layout:
    """Put back every certificate, key and kubeconfig of kubeadm's; what there is then. FixError.

    name, data: of the step.
    """
    paths = [path for path in backup.index.files if is_kubeadms(path, backup.index.serials)]
    message = f"put back the files of {backup.directory.name}"
    async with steps.step(name, message, **data) as step:
        try:
            changed = await asyncio.to_thread(put_back, root, backup, paths)
            layout = await asyncio.to_thread(read_layout, root)
        except (BackupError, CheckError) as error:
            raise FixError("RollbackFailed", str(error)) from None
        if layout.serials != backup.index.serials:
            raise FixError("RollbackFailed", "the files put back are not those of the backup")
        step.result = f"{len(changed)} files put back"
    return layout


def expired_in(backup: Backup, now: float) -> list[str]:
    """The paths of kubeadm's leafs in a backup that have ended. BackupError."""
    wanted = read_files(
        backup,
        lambda path: is_kubeadms(path, backup.index.serials) and path.endswith((".crt", ".conf")),
    )
    return sorted(
        path
        for path, data in wanted.items()
        if any(c.usage != "ca" and c.not_after <= now for c in parse(data).certificates)
    )


def is_kubeadms(path: str, names: Mapping[str, str]) -> bool:
    """Whether a file is a certificate, key or kubeconfig of kubeadm's. names: of its leafs."""
    pure = Path(path)
    if any(pure.is_relative_to(directory) for directory in PKI_DIRECTORIES):
        return pure.suffix in (".crt", ".key", ".pub")  # encryption of secrets may lie there too
    return str(pure.parent) == "/etc/kubernetes" and pure.name in names
