"""Whether a renewal came out whole, and putting back what did not."""

import asyncio
import base64
import contextlib
import os
import signal
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning

from exporter.checks.certificates import Root
from exporter.checks.certificates.layouts import PKI_DIRECTORIES
from exporter.checks.certificates.parsing import parse
from exporter.checks.cgroups import parse_membership
from remediator.fixes.certificates.backup import Backup, BackupError, put_back, read_files
from remediator.fixes.certificates.layout import (
    Layout,
    Pair,
    PairError,
    check_pair,
    current_user,
    read_layout,
)
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


def check_names(root: Root, backup: Backup, after: Layout) -> None:
    """See that each is of whom, and for what, the one in the backup is, and of the CA that is here.
    RenewalError, BackupError.

    A name that is lost breaks those clients only that come by it, long after all else was checked.
    """
    archived = {root.real(pair.certificate.path): pair for pair in after.pairs}
    kept = read_files(backup, archived.__contains__)
    if missing := sorted(archived.keys() - kept.keys()):
        raise RenewalError(f"not in the backup: {', '.join(missing)}")
    with warnings.catch_warnings():  # kubeadm's CAs had the serial number 0 for years
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        for path, pair in archived.items():
            try:
                old = _leaf(pair, kept[path])
                new = _leaf(pair, Path(root.resolve(pair.certificate.path)).read_bytes())
                authority = x509.load_pem_x509_certificates(
                    Path(root.resolve(pair.ca + ".crt")).read_bytes()
                )
                lost = sorted(_claims(old) - _claims(new))
            except (OSError, ValueError, KeyError) as error:
                why = f"{pair.name} can't be compared with the old one ({type(error).__name__})"
                raise RenewalError(why) from None
            if lost:
                raise RenewalError(f"{pair.name} has lost {', '.join(lost)}")
            if new.issuer not in [ca.subject for ca in authority]:
                raise RenewalError(f"{pair.name} is of another CA than {pair.ca}.crt")


def _leaf(pair: Pair, data: bytes) -> x509.Certificate:
    if pair.key == pair.certificate.path:
        data = base64.b64decode(current_user(data)["client-certificate-data"])
    return x509.load_pem_x509_certificate(data)


def _claims(certificate: x509.Certificate) -> set[str]:
    """Whose it is, the names it is good for and what for, each in words."""
    claims = {f"the subject {certificate.subject.rfc4514_string()}"}
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            claims |= {f"the name {name.value}" for name in extension.value}
        elif isinstance(extension.value, x509.ExtendedKeyUsage):
            claims |= {f"the usage {usage.dotted_string}" for usage in extension.value}
    return claims


def is_whole(root: Root, backup: Backup, layout: Layout, now: float) -> bool:
    """Whether every certificate is another than the one in the backup, alive, and as good."""
    new, old = layout.serials, backup.index.serials
    if new.keys() != old.keys() or any(new[name] == old[name] for name in old):
        return False
    if any(pair.certificate.remaining(now) <= 0 for pair in layout.pairs):
        return False
    try:
        for pair in layout.pairs:
            check_pair(root, pair)
        check_names(root, backup, layout)
    except (PairError, RenewalError, BackupError):
        return False
    return True


async def await_kubeadm(procfs: Path, timeout: float, root: Root | None = None) -> None:  # noqa: ASYNC109
    """Wait for the end of a `kubeadm certs renew` that outlived its remediator, or end it.

    Until then the files are its own: what it would still write must not be taken for the result.
    timeout: seconds after which its remediator would have ended it. root: as in `renewing`.
    """
    ends = time.monotonic() + timeout
    while (found := await asyncio.to_thread(renewing, procfs, root)) is not None:
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


def renewing(procfs: Path, root: Root | None = None) -> tuple[int, int] | None:
    """Pid and start time of the host's own kubeadm. A tenant may call a process anything, but it is
    in a container.

    root: where the files of the host are; one that renews others does not count.
    """
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
            if root is not None and not _is_about(Path(entry.path), words, root):
                continue
            started = start_time(int(entry.name), procfs)
        except OSError:
            continue
        if started is not None:
            return int(entry.name), started
    return None


def _is_about(process: Path, words: list[bytes], root: Root) -> bool:
    """Whether the host's files are what it renews; where that can't be known, they may be."""
    here = root.resolve("/").rstrip("/")
    if here and here.encode() in words:  # its --rootfs, to which it may not have changed yet
        return True
    try:
        return (process / "root/etc/kubernetes").samefile(root.resolve("/etc/kubernetes"))
    except FileNotFoundError:
        return False
    except PermissionError:
        return True


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
