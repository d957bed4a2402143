"""The host's own kubeadm, which alone decides what a renewed certificate looks like.

`kubeadm certs renew` asks the cluster for its configuration and, where it gets no answer, silently
takes the defaults, which are wrong on Kubespray. So it is always given one: the cluster's, kept in
a copy for the day the API is down.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from exporter.checks.certificates import Root
from remediator.fixes.certificates.commands import CommandError, Completed, Run

_DIRECTORIES = ("/usr/bin", "/usr/local/bin", "/opt/bin", "/bin", "/usr/sbin", "/usr/local/sbin")
_OLDEST = (1, 15)  # the first whose `renew all` renews the kubeconfigs too
_SINCE_ALPHA = (1, 20)  # the first with `kubeadm certs`; before: `kubeadm alpha certs`
_GO_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_GO_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ms|us|µs|ns|h|m|s)")
_USUAL_CONFIGURATIONS = (
    "/etc/kubernetes/kubeadm-config.yaml",  # Kubespray
    "/etc/kubernetes/kubeadm.yaml",
)

_VERSION = re.compile(r"^v([0-9]+)\.([0-9]+)\.", re.MULTILINE)
_ENCODED = re.compile(r"[A-Za-z0-9+/=]{48,}")


class KubeadmError(Exception):
    """kubeadm is missing, hung, or failed; the sentence has its own last line."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Kubeadm:
    """kubeadm of the host whose files are below `root`."""

    def __init__(self, root: Root, run: Run, *, path: str, timeout: float) -> None:
        self._root = root
        self._run = run
        self._path = path
        self._timeout = timeout

    def find(self) -> str:
        """Its path as seen from here. KubeadmError where there is none."""
        for path in (self._path,) if self._path else [f"{d}/kubeadm" for d in _DIRECTORIES]:
            if self._root.exists(path):
                return self._root.resolve(path)
        if self._path and Path(self._path).exists():
            return self._path  # beside the root and not in it: it's run before it changes its root
        where = self._path or ", ".join(_DIRECTORIES)
        raise KubeadmError(
            "KubeadmMissing", f"there is no kubeadm in {where}; install it or name it in `kubeadm`"
        )

    async def version(self) -> tuple[int, int]:
        """Major and minor. KubeadmError where it doesn't run or is too old."""
        done = await self._kubeadm("version", "--output", "short")
        found = _VERSION.search(done.output)  # warnings may stand around it
        if found is None:
            raise KubeadmError("KubeadmFailed", "kubeadm does not say its version")
        version = int(found[1]), int(found[2])
        if version < _OLDEST:
            raise KubeadmError("KubeadmTooOld", f"kubeadm {found[1]}.{found[2]} is older than 1.15")
        return version

    async def renew_all(self, config: str) -> str:
        """Renew everything it can; what it said. config: a path on the host, or empty.

        KubeadmError where it failed: some certificates may be renewed by then.
        """
        alpha = [] if await self.version() >= _SINCE_ALPHA else ["alpha"]
        arguments = [*alpha, "certs", "renew", "all"]
        if config:
            arguments += ["--config", config]
        return (await self._kubeadm(*arguments)).output

    async def _kubeadm(self, *arguments: str) -> Completed:
        here = self._root.resolve("/").rstrip("/")
        # Its own --rootfs is a chroot: it then sees /etc/kubernetes where it expects it.
        command = [self.find(), *(["--rootfs", here] if here else []), *arguments]
        try:
            done = await self._run(command, self._timeout)
        except CommandError as error:
            raise KubeadmError("KubeadmFailed", str(error)) from None
        if done.status != 0:
            lines = [
                line
                for line in done.output.splitlines()
                if line.strip() and not line.startswith(("To see the stack trace", "-----"))
            ]
            last = next((line for line in lines if "error" in line.lower()), (lines or [""])[-1])
            words = _ENCODED.sub("…", last)[:500]  # it has keys at hand, and -v prints a lot
            raise KubeadmError("KubeadmFailed", f"kubeadm failed ({done.status}): {words}")
        return done


def find_configuration(root: Root, chosen: str, saved: str) -> str:
    """The path, on the host, of the configuration to renew with; empty where there is none.

    chosen: the setting; saved: where the cluster's own was saved when the API last answered.
    """
    for path in (chosen, saved):
        if path and root.exists(path):
            return path
    for path in _USUAL_CONFIGURATIONS:  # on a node that joined it may say how to join, no more
        if any(_documents(read_configuration(root, path))):
            return path
    return ""


def read_configuration(root: Root, path: str) -> str:
    """The text of a kubeadm configuration on the host; empty where it can't be read."""
    try:
        return Path(root.resolve(path)).read_text(errors="replace") if path else ""
    except OSError:
        return ""


def certificates_directory(configuration: str) -> str:
    """The `certificatesDir` that a kubeadm configuration names; empty where it names none."""
    named = _of_cluster(configuration, "certificatesDir")
    return str(PurePosixPath(named)) if named else ""


def cluster_version(configuration: str) -> tuple[int, int] | None:
    """The `kubernetesVersion` of a kubeadm configuration; None where it has none, or a channel."""
    found = re.match(r"v?([0-9]+)\.([0-9]+)\.", _of_cluster(configuration, "kubernetesVersion"))
    return (int(found[1]), int(found[2])) if found else None


def certificate_life(configuration: str) -> float | None:
    """Seconds that a renewed certificate lives; None where the configuration leaves it to kubeadm.

    `certificateValidityPeriod` is Go's notation of a time, and of kubeadm 1.31 and newer. (Its
    `caCertificateValidityPeriod` is for new CAs only, which no renewal makes.)
    """
    text = _of_cluster(configuration, "certificateValidityPeriod")
    parts = _GO_PART.findall(text)
    if not parts or "".join(n + unit for n, unit in parts) != text:
        return None
    return sum(float(number) * _GO_UNITS[unit] for number, unit in parts)


def _of_cluster(configuration: str, key: str) -> str:
    """A value of the ClusterConfiguration among the documents; empty where there is none."""
    return next((str(d[key]) for d in _documents(configuration) if d.get(key)), "")


def _documents(configuration: str) -> Iterator[dict[str, Any]]:
    try:
        for document in yaml.load_all(configuration, Loader=yaml.BaseLoader):
            if isinstance(document, dict) and document.get("kind") == "ClusterConfiguration":
                yield document
    except yaml.YAMLError:
        return
