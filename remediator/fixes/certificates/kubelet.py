"""This node's kubelet, without which no component that is ended comes back."""

from pathlib import Path

import aiohttp

from exporter.checks.certificates import Root
from exporter.checks.certificates.parsing import MalformedError, load_yaml

_CONFIGURATION = "/var/lib/kubelet/config.yaml"
_PORT, _HOST = 10248, "127.0.0.1"  # its own defaults
_ANSWER = 10.0  # seconds


async def kubelet_problem(root: Root) -> str:
    """Why it would not start a component again, in a sentence; empty where it would.

    Its health covers the loop that starts static pods. Where that port is closed, nothing is known
    against it.
    """
    settings = _settings(root)
    port = str(settings.get("healthzPort", _PORT))
    if port == "0":
        return ""
    host = str(settings.get("healthzBindAddress") or _HOST)
    if host in ("0.0.0.0", "::"):  # noqa: S104 - what it listens on, not what we do
        host = _HOST
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/healthz"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER)) as session,
            session.get(url) as answer,
        ):
            if answer.status == 200:
                return ""
            why = f"answers {answer.status}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        why = "does not answer"
    return f"the kubelet of this node is not well: {url} {why}; nothing it runs would be restarted"


def _settings(root: Root) -> dict[str, object]:
    try:
        found = load_yaml(Path(root.resolve(_CONFIGURATION)).read_bytes())
    except (OSError, MalformedError):
        return {}
    return found if isinstance(found, dict) else {}
