"""Which component of this node uses which certificate file, and whether it uses it as it is now.

Servers are asked what they serve. The controller-manager and the scheduler can't be asked (what
they serve is a self-signed certificate of their own, which no renewal touches): they read their
kubeconfig once, when they start, so one that started before the file was written is stale.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from exporter.checks.certificates.files import MAX_BYTES, open_regular
from exporter.checks.certificates.layouts import KUBERNETES_DIRECTORY, place
from exporter.checks.certificates.model import Inventory
from exporter.checks.certificates.parsing import MalformedError, load_yaml
from exporter.checks.certificates.root import Root
from exporter.checks.certificates.served import Served

MANIFESTS = f"{KUBERNETES_DIRECTORY}/manifests"
ETCD_ENVIRONMENT = "/etc/etcd.env"
_START_TOLERANCE = 1.0  # seconds: the boot time in /proc/stat is whole seconds
_POD_UID = re.compile(rb"pod([0-9a-f]{32}|[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})")
_STATIC_UID = re.compile("[0-9a-f]{32}")  # a manifest's hash; the API's own have dashes
_CONTAINER = re.compile(rb"[0-9a-f]{64}")
_COMM = {  # the kernel keeps 15 characters of a name
    b"kube-apiserver": "kube-apiserver",
    b"kube-controller": "kube-controller-manager",
    b"kube-scheduler": "kube-scheduler",
    b"etcd": "etcd",
}
_AT_START = {
    "kube-controller-manager": "controller-manager.conf",
    "kube-scheduler": "scheduler.conf",
}


class ServedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file, and the endpoint at which a component serves it."""

    component: str
    name: str
    endpoint: str
    path: str


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A running control plane component: a static pod's container, or etcd on the host."""

    component: str
    pid: int
    start_ticks: int
    """Clock ticks after boot: with the pid, its identity."""
    started_at: float
    """Unix seconds, right to about a second."""
    container: str = ""
    """The id of its container, whichever runtime made it; empty for etcd on the host."""


class Staleness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a component still uses an older certificate than the one on disk."""

    component: str
    name: str
    stale: bool


def served_files(root: Root) -> tuple[ServedFile, ...]:
    """What the components of this node should be serving; empty where it's no control plane."""
    found: list[ServedFile] = []
    apiserver = manifest_flags(root, "kube-apiserver")
    if apiserver and (path := apiserver.get("tls-cert-file")):
        host = _dialable(apiserver.get("bind-address", ""))
        endpoint = f"{host}:{apiserver.get('secure-port', '6443')}"
        found.append(_served(root, "kube-apiserver", endpoint, path))
    etcd = manifest_flags(root, "etcd") or etcd_environment(root)
    for urls, file in (
        ("listen-client-urls", "cert-file"),
        ("listen-peer-urls", "peer-cert-file"),
    ):
        endpoint = endpoint_of(etcd.get(urls, ""))
        if endpoint and (path := etcd.get(file)):
            found.append(_served(root, "etcd", endpoint, path))
    if apiserver:
        found.extend(_kubelet(root))
    return tuple(found)


def _kubelet(root: Root) -> Iterator[ServedFile]:
    settings = _load_yaml(root, "/var/lib/kubelet/config.yaml")
    if not isinstance(settings, dict):
        return
    path = settings.get("tlsCertFile") or ""
    for default in ("kubelet-server-current.pem", "kubelet.crt"):
        path = path or _if_there(root, f"/var/lib/kubelet/pki/{default}")
    if isinstance(path, str) and path:
        host = _dialable(str(settings.get("address") or ""))
        yield _served(root, "kubelet", f"{host}:{settings.get('port') or '10250'}", path)


def _if_there(root: Root, path: str) -> str:
    return path if root.exists(path) else ""


def _served(root: Root, component: str, endpoint: str, path: str) -> ServedFile:
    name = place(path, root.exists).name
    return ServedFile(component=component, name=name, endpoint=endpoint, path=path)


def _dialable(host: str) -> str:
    """An address to reach a server at that listens on `host`."""
    if host in ("", "0.0.0.0"):  # noqa: S104 - what it listens on, not what we do
        return "127.0.0.1"
    if ":" in host:
        return "[::1]" if host == "::" else f"[{host}]"
    return host


def endpoint_of(urls: str) -> str:
    """The first https URL of a list, one on loopback before others, as host:port."""
    found = []
    for url in urls.split(","):
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError:
            continue
        if parts.scheme == "https" and host and port:
            found.append(f"{_dialable(host)}:{port}")
    loopback = [e for e in found if e.startswith(("127.", "[::1]", "localhost"))]
    return (loopback or found or [""])[0]


def manifest_flags(root: Root, component: str) -> dict[str, str]:
    """The flags of a static pod's command, without dashes; empty where there's no such manifest."""
    pod = _load_yaml(root, f"{MANIFESTS}/{component}.yaml")
    try:
        container = pod["spec"]["containers"][0]
        words = [*container.get("command", ()), *container.get("args", ())]
    except (TypeError, KeyError, IndexError, AttributeError):
        return {}
    flags = {}
    for word in words:
        if isinstance(word, str) and word.startswith("--"):
            key, _, value = word[2:].partition("=")
            flags[key] = value
    return flags


def etcd_environment(root: Root, prefix: str = "ETCD_") -> dict[str, str]:
    """Kubespray's settings of a host etcd, by the names of the flags; empty where there is none.

    prefix: `ETCD_` for the server's, `ETCDCTL_` for a client's.
    """
    flags = {}
    for line in _load_text(root, ETCD_ENVIRONMENT).splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and key.startswith(prefix):
            flags[key.removeprefix(prefix).lower().replace("_", "-")] = value.strip("\"' ")
    return flags


def _load_text(root: Root, path: str) -> str:
    try:
        descriptor, _ = open_regular(root.resolve(path))
    except OSError:
        return ""
    if descriptor is None:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_BYTES).decode("utf-8", "replace")


def _load_yaml(root: Root, path: str) -> Any:
    try:
        return load_yaml(_load_text(root, path).encode())
    except MalformedError:
        return None


def find_processes(procfs: Path, root: Root) -> tuple[Process, ...]:
    """The control plane's processes on this node.

    A tenant may run a process of any name, and a Deployment a second scheduler. The control plane's
    own are in a static pod whose log directory is in kube-system, which no tenant can make.
    """
    pods = _static_pods(root)
    if not pods:
        return ()
    found = []
    for entry in os.scandir(procfs):
        if not entry.name.isdigit():
            continue
        directory = Path(entry.path)
        component = _COMM.get(_read(directory / "comm").rstrip(b"\n"))
        if component is None:
            continue
        cgroup = _read(directory / "cgroup")
        uid = _POD_UID.search(cgroup)
        if uid is None or pods.get(uid[1].replace(b"_", b"-").decode()) != component:
            continue
        if (process := read_process(procfs, component, int(entry.name))) is not None:
            container = _CONTAINER.search(cgroup)
            identity = container[0].decode() if container else ""
            found.append(msgspec.structs.replace(process, container=identity))
    return tuple(found)


def read_process(procfs: Path, component: str, pid: int) -> Process | None:
    """A process that is known to be a component's; None where it's gone."""
    ticks, boot = start_ticks(procfs, pid), _boot_time(procfs)
    if ticks is None or boot is None:
        return None
    started_at = boot + ticks / os.sysconf("SC_CLK_TCK")
    return Process(component=component, pid=pid, start_ticks=ticks, started_at=started_at)


def _static_pods(root: Root) -> dict[str, str]:
    """Pod uid to component, from the names of the kubelet's log directories."""
    found = {}
    try:
        names = os.listdir(root.resolve("/var/log/pods"))  # noqa: PTH208 - names are all it needs
    except OSError:
        return {}
    for name in names:
        namespace, _, rest = name.partition("_")
        pod, _, uid = rest.rpartition("_")
        if namespace != "kube-system" or not _STATIC_UID.fullmatch(uid):
            continue
        for component in _COMM.values():
            if pod.startswith(component + "-"):
                found[uid] = component
    return found


def start_ticks(procfs: Path, pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None where it's gone or a zombie."""
    stat = _read(procfs / str(pid) / "stat")
    fields = stat[stat.rfind(b")") + 2 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def _boot_time(procfs: Path) -> float | None:
    for line in _read(procfs / "stat").splitlines():
        if line.startswith(b"btime "):
            return float(line.split()[1])
    return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def staleness(
    on_disk: Inventory,
    files: Sequence[ServedFile],
    served: Mapping[str, Served],
    processes: Sequence[Process],
    root: Root,
) -> tuple[Staleness, ...]:
    """Who uses an older certificate than the one on disk; what can't be known is left out.

    on_disk: a reading of the paths of `files`. served: what answered, by endpoint.
    """
    by_path: dict[str, str] = {}
    for certificate in on_disk.certificates:
        by_path.setdefault(certificate.path, certificate.fingerprint)  # of a chain, the leaf
    found = []
    for file in files:
        expected = by_path.get(file.path)
        answer = served.get(file.endpoint)
        if expected is not None and answer is not None:
            stale = answer.certificate.fingerprint != expected
            found.append(Staleness(component=file.component, name=file.name, stale=stale))
    for process in processes:
        name = _AT_START.get(process.component)
        written = _written_at(root, f"{KUBERNETES_DIRECTORY}/{name}") if name else None
        if name and written is not None:
            stale = process.started_at + _START_TOLERANCE < written
            found.append(Staleness(component=process.component, name=name, stale=stale))
    return _one_each(found)


def _one_each(found: Sequence[Staleness]) -> tuple[Staleness, ...]:
    """One per component and file; while two processes overlap in a restart, stale counts."""
    merged: dict[tuple[str, str], Staleness] = {}
    for one in found:
        key = (one.component, one.name)
        if key not in merged or one.stale:
            merged[key] = one
    return tuple(merged.values())


def _written_at(root: Root, path: str) -> float | None:
    try:
        return Path(root.resolve(path)).stat().st_mtime
    except OSError:
        return None
