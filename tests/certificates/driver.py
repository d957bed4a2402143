"""Runs one rotation or restore on the node it is started on, as the command line does, and dies.

`python -m tests.certificates.driver FOLDER OPTIONS` where OPTIONS is JSON: `force`, `restore` (a
backup), `kill_after` (SIGKILL to itself after so many records of steps), `resume` (finish what a
dead one began, and nothing else), `sabotage` (a name in SABOTAGES), `settings`. The journal is in
FOLDER. It prints the remediation as one line of JSON, and each step on stderr.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from exporter import logs
from remediator.config import hook, load
from remediator.fixes import settings_types
from remediator.fixes.certificates import RotateCertificates, Settings, commands
from remediator.flags import read
from remediator.hand import Forced, Hands, LiveJournal
from remediator.host import HostClock
from remediator.model import Claim, Remediation, Step, Target


class DyingJournal(LiveJournal):
    """Kills its process as soon as so many records of steps are on disk; 0: never."""

    def __init__(self, path: Path, kill_after: int) -> None:
        super().__init__(path, HostClock(), lambda line: print(line, file=sys.stderr, flush=True))
        self._left = kill_after

    async def record_step(self, remediation_id: str, claim: Claim, index: int, step: Step) -> None:
        await super().record_step(remediation_id, claim, index, step)
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


PKI = Path("/etc/kubernetes/pki")


async def unusable_apiserver(arguments: Sequence[str], timeout: float) -> commands.Completed:
    """kubeadm, after which the API server ends as soon as it starts."""
    done = await commands.run(arguments, timeout)
    if "renew" in arguments:
        (PKI / "sa.pub").write_text("no key\n")
    return done


async def unusable_scheduler(arguments: Sequence[str], timeout: float) -> commands.Completed:
    """kubeadm, after which the scheduler ends as soon as it starts."""
    done = await commands.run(arguments, timeout)
    if "renew" in arguments:
        kubeconfig = PKI.parent / "scheduler.conf"
        contradiction = "insecure-skip-tls-verify: true\n    certificate-authority-data:"
        text = kubeconfig.read_text().replace("certificate-authority-data:", contradiction)
        kubeconfig.write_text(text)
    return done


async def half(arguments: Sequence[str], timeout: float) -> commands.Completed:
    """kubeadm that gives up in the middle: some renewed, one key already replaced."""
    if "renew" not in arguments:
        return await commands.run(arguments, timeout)
    for name in ("admin.conf", "apiserver", "etcd-server"):
        await commands.run([name if word == "all" else word for word in arguments], timeout)
    (PKI / "front-proxy-client.key").write_bytes((PKI / "apiserver.key").read_bytes())
    return commands.Completed(status=1, output="error: no more")


SABOTAGES: Mapping[str, commands.Run] = {
    "": commands.run,
    "apiserver": unusable_apiserver,
    "scheduler": unusable_scheduler,
    "half": half,
}


async def drive(folder: Path, options: dict[str, Any]) -> Remediation | None:
    node = os.uname().nodename
    config, _ = load(None, settings_types())
    _, flags = read(["serve", f"--journal={folder}/journal.db", f"--node-name={node}"], {})
    fix = RotateCertificates(
        msgspec.convert(options.get("settings", {}), Settings, dec_hook=hook),
        node_name=node,
        run=SABOTAGES[options.get("sabotage", "")],
    )
    target = Target(node=node)
    journal = DyingJournal(flags.journal, options.get("kill_after", 0))
    hands = Hands(flags, config, fix, journal)
    try:
        if options.get("resume"):
            left = await hands.finish_left(target)
            return left[0] if left else None
        if backup := options.get("restore"):
            restoring = fix.restoring(backup, forced=options.get("force", False))
            return await hands.run(target, "test", restoring)
        return await hands.run(target, "test", Forced(fix) if options.get("force") else fix)
    finally:
        await journal.aclose()


if __name__ == "__main__":
    logs.configure(level="info", format="logfmt")
    said = asyncio.run(drive(Path(sys.argv[1]), json.loads(sys.argv[2])))
    print(msgspec.json.encode(said).decode())
