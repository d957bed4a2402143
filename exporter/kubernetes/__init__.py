"""The one place that talks to the Kubernetes API: access, client, and the list+watch cache."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from exporter.kubernetes.access import AccessError, check_access, has_access, load_access
from exporter.kubernetes.client import ApiError, Client


def client(kubeconfig: Path | None, environ: Mapping[str, str] = os.environ) -> Client:
    """A client that reads its access when first used, and again when it is refused."""
    return Client(partial(load_access, kubeconfig, environ))


__all__ = ["AccessError", "ApiError", "Client", "check_access", "client", "has_access"]
