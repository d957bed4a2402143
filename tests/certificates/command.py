"""The remediator's command line on a PKI of its own, beside no cluster."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster.pki import Pki


def command_line(
    pki: Pki,
    folder: Path,
    command: str,
    *arguments: str,
    output: str = "json",
    policy: str = "",
    kubeadm: Path | None = None,
) -> list[str]:
    """What to type. folder: of the journal, locks and configuration; policy: a line of YAML for the
    fix; output: empty for a command that has no such flag, and that acts on no host."""
    config = folder / "config.yaml"
    settings = f"settings: {{kubeadm: {kubeadm or pki.binaries.kubeadm}}}"
    rules = ", ".join(filter(None, (policy, settings)))
    config.write_text(f"fixes: {{rotate-certificates: {{{rules}}}}}\n")
    typed = [sys.executable, "-m", "remediator", command, *arguments]
    typed += [f"--config.file={config}", f"--journal={folder}/journal.db"]
    if output:
        typed += ["-o", output, "--node-name=node-1"]
        typed += [f"--path.rootfs={pki.rootfs}", f"--path.locks={folder}/locks"]
    return typed


def remediator(
    pki: Pki, folder: Path, command: str, *arguments: str, output: str = "json", **options: Any
) -> tuple[int, Any, str]:
    """Exit status, what it printed as JSON ({} where nothing), what stood on standard error."""
    typed = command_line(pki, folder, command, *arguments, output=output, **options)
    done = subprocess.run(typed, capture_output=True, text=True, check=False, timeout=300)
    said = json.loads(done.stdout or "{}") if output == "json" else {}
    return done.returncode, said or {}, done.stderr
