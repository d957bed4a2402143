"""What is asked of the cluster, of kubeadm and of the files before anything is touched."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from exporter.kubernetes.client import ApiError
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.cluster import opted_out, refuse_wrong_clock
from remediator.fixes.certificates.kubeadm import cluster_version
from remediator.fixes.certificates.layout import ETCD_STASH
from remediator.fixes.certificates.lease import RotationLease
from remediator.fixes.certificates.plan import RefusedError
from remediator.fixes.certificates.preflight import Preflight
from remediator.model import CheckError
from tests.certificates.conftest import MakePki
from tests.certificates.test_kubeadm_versions import Kubeadm
from tests.certificates.test_rotate import NODE, files, rotate
from tests.cluster.pki import Pki

NOW = 1_800_000_000.0
NODES = "/api/v1/nodes"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
MANIFESTS = "manifests"


class Api:
    """An API server that has these objects, and errors in their place."""

    def __init__(self, objects: Mapping[str, object]) -> None:
        self.objects = objects

    async def get(self, path: str) -> Any:
        found = self.objects.get(path.partition("?")[0])
        if isinstance(found, Exception):
            raise found
        return found


def api(objects: Mapping[str, object]) -> ApiServer:
    return cast("ApiServer", Api(objects))


def nodes(**behind: float | str | None) -> ApiServer:
    """A Ready node each, whose clock is so many seconds behind; None: not Ready."""
    objects: dict[str, object] = {NODES: {"items": []}}
    items = []
    for name, seconds in behind.items():
        status = "False" if seconds is None else "True"
        condition = {"type": "Ready", "status": status}
        items.append({"metadata": {"name": name}, "status": {"conditions": [condition]}})
        said = NOW - (seconds if isinstance(seconds, float) else 1e6)
        at = datetime.fromtimestamp(said, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        renewed = seconds if isinstance(seconds, str) else at
        objects[f"{LEASES}/{name}"] = {"spec": {"renewTime": renewed}}
    return api({**objects, NODES: {"items": items}})


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({}, ""),
        ({"b": 8.0}, ""),
        ({"b": -8.0, "c": 40 * 86400.0}, ""),  # one agrees: it's the other that is wrong
        ({"b": None}, ""),  # what is down has said nothing for long
        ({"b": "when?"}, ""),
        ({"b": 40 * 86400.0}, "3456000 s ahead of that of b"),
        ({"b": -4000.0, "c": None}, "4000 s behind that of b"),
        ({"b": 7200.0, "c": 7190.0}, "7190 s ahead of that of b, c"),
    ],
)
async def test_c55_a_clock_that_no_other_node_has_is_refused(
    others: dict[str, float | str | None], said: str
) -> None:
    cluster = nodes(a=1e6, **others)
    if not said:
        await refuse_wrong_clock(cluster, "a", lambda: NOW)
        return
    with pytest.raises(RefusedError, match=said) as refused:
        await refuse_wrong_clock(cluster, "a", lambda: NOW)
    assert refused.value.reason == "ClockWrong"


async def test_c56_not_to_know_whether_it_is_forbidden_is_no_leave() -> None:
    def node(annotations: object) -> ApiServer:
        return api({f"{NODES}/a": {"metadata": {"annotations": annotations}}})

    assert await opted_out(node(None), "a") == ""
    assert "node a" in await opted_out(node({"upkeep.dev/remediation": "disabled"}), "a")
    with pytest.raises(CheckError, match="can't be read: no answer"):
        await opted_out(api({f"{NODES}/a": ApiError(0, "no answer")}), "a")
    with pytest.raises(CheckError, match=r"no node a, .*--node-name"):
        await opted_out(api({}), "a")


async def gone(*_: object) -> str:
    raise ApiError(0, "no answer")


async def there(*_: object) -> str:
    return ""


@pytest.fixture
def control_plane(make_pki: MakePki) -> Pki:
    pki = make_pki({"scheduler.conf": timedelta(days=-1), "front-proxy-client": timedelta(days=-1)})
    make_control_plane(pki)
    return pki


def make_control_plane(pki: Pki) -> None:
    """An API server's manifest, and a kubelet that has no port to be asked for its health."""
    manifest = pki.directory / MANIFESTS / "kube-apiserver.yaml"
    manifest.parent.mkdir()
    manifest.touch()
    settings = pki.rootfs / "var/lib/kubelet/config.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("healthzPort: 0\n")


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c58_only_the_loss_of_what_it_needs_explains_that_the_api_is_gone(
    control_plane: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery stops etcd: an API server that is away for a moment is no reason."""

    monkeypatch.setattr(RotationLease, "check", gone)
    for look in (rotate(control_plane).check, rotate(control_plane).force):
        condition = await look(NODE)
        assert (condition.broken, condition.reason) == (False, "ApiUnreachable")
        assert condition.message.startswith("no answer; no certificate that it needs has expired")


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
@pytest.mark.parametrize("asked", ["refuse_unready_peers", "fetch_configuration"])
async def test_c58_an_api_that_answered_a_moment_before_is_not_gone(
    make_pki: MakePki, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    pki = make_pki(timedelta(days=-1))
    make_control_plane(pki)
    monkeypatch.setattr(RotationLease, "check", there)
    for name in ("refuse_unready_peers", "refuse_wrong_clock", "fetch_configuration"):
        answer = gone if name == asked else there
        monkeypatch.setattr(f"remediator.fixes.certificates.preflight.{name}", answer)
    condition = await rotate(pki).force(NODE)
    assert (condition.broken, condition.reason) == (False, "ApiUnreachable")
    assert "had answered a moment before" in condition.message


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c58_the_clusters_configuration_must_mean_this_pki_and_be_kubeadms(
    control_plane: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"kind": "ClusterConfiguration", "kubernetesVersion": "v1.20.2"}

    async def fetched(*_: object) -> str:
        return yaml.safe_dump(document)

    monkeypatch.setattr(RotationLease, "check", there)
    monkeypatch.setattr(Preflight, "_check_cluster", fetched)
    monkeypatch.setattr("remediator.fixes.certificates.fix.opted_out", there)
    before = files(control_plane.directory)
    assert (await rotate(control_plane).check(NODE)).broken
    document["certificatesDir"] = "/srv/pki"
    condition = await rotate(control_plane).check(NODE)
    assert (condition.broken, condition.reason) == (False, "NoConfiguration")
    assert "/srv/pki" in condition.message
    del document["certificatesDir"]
    for version, reason in (("v1.21.9", "CertificatesDue"), ("v1.22.0", "KubeadmTooNew")):
        condition = await rotate(control_plane, Kubeadm(f"W: odd\n{version}\nW: odd")).check(NODE)
        assert condition.reason == reason, condition.message
    assert "install kubeadm 1.20" in condition.message
    assert files(control_plane.directory) == before


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c58_a_named_configuration_that_is_not_there_is_said(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    condition = await rotate(pki, kubeadm_config="/etc/mine.yaml").check(NODE)
    assert (condition.broken, condition.reason) == (False, "NoConfiguration")
    assert "/etc/mine.yaml is not there" in condition.message


@pytest.mark.parametrize(
    ("said", "version"),
    [("v1.29.3", (1, 29)), ("1.7.0", (1, 7)), ("stable-1", None), ("", None)],
)
def test_of_which_version_a_cluster_is(said: str, version: tuple[int, int] | None) -> None:
    text = yaml.safe_dump({"kind": "ClusterConfiguration", "kubernetesVersion": said})
    assert cluster_version(text) == version


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c4_a_ca_key_behind_a_password_is_said_to_be(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    path = pki.directory / "pki/front-proxy-ca.key"
    key = load_pem_private_key(path.read_bytes(), password=None)
    secret = BestAvailableEncryption(b"secret")
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
    condition = await rotate(pki).check(NODE)
    assert (condition.broken, condition.reason) == (False, "CAKeyMissing")
    assert "front-proxy-ca.key is behind a password" in condition.message


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c9_a_recovery_makes_sure_of_room_for_etcds_data_before_it_stops_etcd(
    make_pki: MakePki, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki = make_pki(timedelta(days=-1))
    make_control_plane(pki)
    command = ["etcd", "--data-dir=/var/lib/data"]
    pod = {"spec": {"containers": [{"command": command}]}}
    (pki.directory / MANIFESTS / "etcd.yaml").write_text(yaml.safe_dump(pod))
    data = pki.rootfs / "var/lib/data/member/snap/db"
    data.parent.mkdir(parents=True)
    with data.open("wb") as file:
        file.truncate(1 << 43)  # of holes, on a disk that has less

    monkeypatch.setattr(RotationLease, "check", gone)
    condition = await rotate(pki).force(NODE)
    assert (condition.broken, condition.reason) == (False, "BackupImpossible")
    stash = pki.rootfs / ETCD_STASH.lstrip("/")
    stash.parent.mkdir(parents=True, exist_ok=True)
    (pki.directory / MANIFESTS / "etcd.yaml").rename(stash)  # as a recovery that died leaves it
    condition = await rotate(pki).force(NODE)
    assert (condition.broken, condition.reason) == (False, "BackupImpossible")
    data.unlink()
    assert (await rotate(pki).force(NODE)).broken
