"""Runs one rotation on the node it is started on, as the worker would, with a step log in a file.

`python -m tests.certificates.driver LOG OPTIONS` where OPTIONS is JSON: `force`, `kill_after`
(SIGKILL to itself after so many records), `resume`, `settings`. It prints one line of
JSON, and each record of a step on stderr.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from remediator.fixes.certificates import RotateCertificates, Settings, commands
from remediator.model import CheckError, FixError, Step, Steps, Target


class FileLog:
    """On disk before `record` returns."""

    def __init__(self, path: Path, kill_after: int) -> None:
        self._path = path
        self._left = kill_after
        self.steps: list[Step] = []
        if path.exists():
            self.steps = msgspec.json.decode(path.read_bytes(), type=list[Step])

    async def record(self, index: int, step: Step) -> None:
        if index == len(self.steps):
            self.steps.append(step)
        else:
            self.steps[index] = step
        temporary = self._path.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(self.steps))
        temporary.rename(self._path)
        print(
            datetime.now(UTC).strftime("%H:%M:%S"),
            "begins" if step.ok is None else "ends",
            step.name,
            step.ok,
            step.result,
            file=sys.stderr,
            flush=True,
        )
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


async def foreign_ca(arguments: Sequence[str], timeout: float) -> commands.Completed:
    """kubeadm, after which the API server's pair is whole, and signed by the wrong CA."""
    done = await commands.run(arguments, timeout)
    if "renew" in arguments:
        pki = Path("/etc/kubernetes/pki")
        request = x509.load_pem_x509_certificate((pki / "apiserver.crt").read_bytes())
        key = load_pem_private_key((pki / "front-proxy-ca.key").read_bytes(), password=None)
        builder = (
            x509.CertificateBuilder()
            .subject_name(request.subject)
            .issuer_name(request.issuer)
            .public_key(request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(request.not_valid_before_utc)
            .not_valid_after(request.not_valid_after_utc)
        )
        for extension in request.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        signed = builder.sign(cast("RSAPrivateKey", key), SHA256())
        (pki / "apiserver.crt").write_bytes(signed.public_bytes(Encoding.PEM))
    return done


async def drive(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    node = os.uname().nodename
    settings = msgspec.convert(options.get("settings", {}), Settings)
    run = foreign_ca if options.get("sabotage") else commands.run
    fix = RotateCertificates(settings, node_name=node, run=run)
    target = Target(node=node)
    log = FileLog(path, options.get("kill_after", 0))
    steps = Steps(log.record, lambda: datetime.now(UTC), log.steps)
    try:
        if options.get("resume"):
            outcome = await fix.resume(target, steps)
            return {"phase": outcome.phase, "reason": outcome.reason, "message": outcome.message}
        condition = await (fix.force(target) if options.get("force") else fix.check(target))
        if not condition.broken:
            return {"phase": "Skipped", "reason": condition.reason, "message": condition.message}
        outcome = await fix.apply(target, condition, steps)
        verdict = await fix.verify(target, condition)
    except FixError as error:
        return {"phase": "Failed", "reason": error.reason, "message": str(error)}
    except CheckError as error:
        return {"phase": "Failed", "reason": "CheckError", "message": str(error)}
    return {
        "phase": outcome.phase,
        "reason": outcome.reason,
        "message": outcome.message,
        "still_broken": verdict.broken,
        "plan": condition.plan,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(Path(sys.argv[1]), json.loads(sys.argv[2])))))
