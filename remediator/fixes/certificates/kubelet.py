"""This node's kubelet, without which no component that is ended comes back."""

import asyncio
import time
from pathlib import Path

import aiohttp

from exporter.checks.certificates import Root
from exporter.checks.certificates.parsing import MalformedError, load_yaml

_CONFIGURATIONS = ("/var/lib/kubelet/config.yaml", "/etc/kubernetes/kubelet-config.yaml")
"""kubeadm's, and Kubespray's."""
_PORT, _HOST = 10248, "127.0.0.1"  # its own defaults
_ANSWER = 10.0  # seconds
_PATIENCE = 30.0  # seconds
_POLL = 0.5


async def kubelet_problem(root: Root) -> str:
    """Why it would not start a component again, in a sentence; empty where it would.

    Its health covers the loop that starts static pods. Where that port is closed, nothing is known
    against it. One that was just restarted is given the time to answer.
    """
    settings = _settings(root)
    port = str(settings.get("healthzPort", _PORT))
    if port == "0":
        return ""
    host = str(settings.get("healthzBindAddress") or _HOST)
    if host in ("0.0.0.0", "::"):  # noqa: S104 - what it listens on, not what we do
        host = _HOST
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/healthz"
    ends = time.monotonic() + _PATIENCE
    while why := await _problem(url):
        if time.monotonic() > ends:
            return f"the kubelet of this node is not well: {url} {why}, and what ends stays away"
        await asyncio.sleep(_POLL)
    return ""


async def _problem(url: str) -> str:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER)) as session,
            session.get(url) as answer,
        ):
            return "" if answer.status == 200 else f"answers {answer.status}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return "does not answer"


def _settings(root: Root) -> dict[str, object]:
    for path in _CONFIGURATIONS:
        try:
            found = load_yaml(Path(root.resolve(path)).read_bytes())
        except (OSError, MalformedError):
            continue
        if isinstance(found, dict):
            return found
    return {}
