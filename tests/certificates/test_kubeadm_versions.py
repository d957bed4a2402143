"""kubeadm old and new: its commands by version, and what its configuration says."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from exporter.checks.certificates import Root
from remediator.fixes.certificates import commands, kubeadm
from remediator.fixes.certificates.cluster import default_configuration
from remediator.fixes.certificates.kubeadm import (
    certificate_life,
    certificates_directory,
    find_configuration,
)
from remediator.model import Phase
from tests.certificates.conftest import MakePki, StepLog
from tests.certificates.test_rotate import NODE, files, rotate, serials, steps
from tests.cluster.kubeadm_config import Settings, init_configuration, join_configuration
from tests.cluster.pki import Pki

HOUR = 3600.0
DAY = 24 * HOUR


def documents(**cluster: str) -> str:
    """A configuration as kubeadm keeps it, with these keys of the cluster's."""
    init = {"kind": "InitConfiguration", "certificatesDir": "/not/this", "certificateKey": "x"}
    return yaml.safe_dump_all([init, {"kind": "ClusterConfiguration", **cluster}])


@pytest.mark.parametrize(
    ("text", "directory"),
    [
        (documents(certificatesDir="/etc/kubernetes/ssl"), "/etc/kubernetes/ssl"),
        (documents(certificatesDir="/etc/kubernetes/pki/"), "/etc/kubernetes/pki"),
        (documents(), ""),  # without it kubeadm means its default, and not the present folder
        (documents(certificatesDir=""), ""),
        ("kind: InitConfiguration\n", ""),
        ("- a list\n---\nkind: [", ""),
        ("", ""),
    ],
)
def test_where_a_configuration_says_that_certificates_are(text: str, directory: str) -> None:
    assert certificates_directory(text) == directory


@pytest.mark.parametrize(
    ("period", "seconds"),
    [
        ("8760h0m0s", 365 * DAY),
        ("87600h", 3650 * DAY),
        ("1h30m", 1.5 * HOUR),
        ("1.5h", 1.5 * HOUR),
        ("90m", 1.5 * HOUR),
        ("1s500ms", 1.5),
        ("365d", None),  # no unit of Go's: kubeadm refuses the file
        ("h", None),
        ("", None),
    ],
)
def test_how_long_a_configuration_lets_certificates_live(
    period: str, seconds: float | None
) -> None:
    said = documents(certificateValidityPeriod=period, caCertificateValidityPeriod="1h")
    assert certificate_life(said) == seconds


def test_a_configuration_without_a_period_leaves_it_to_kubeadm() -> None:
    assert certificate_life(documents(caCertificateValidityPeriod="1h")) is None
    assert certificate_life("no yaml: [") is None


class Kubeadm:
    """The real one, which says to be of another version, and is written down."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.asked: list[list[str]] = []

    async def __call__(self, arguments: Sequence[str], timeout: float) -> commands.Completed:
        self.asked.append([a for a in arguments[1:] if a[:1] not in "-/"])
        if "version" in arguments:
            return commands.Completed(status=0, output=self.version)
        return await commands.run(arguments, timeout)


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("v1.19.16", ["alpha", "certs", "renew", "all"]),
        ("v1.20.0", ["certs", "renew", "all"]),
    ],
)
@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c16_old_and_new_kubeadm_renew_by_their_own_command(
    make_pki: MakePki, version: str, command: list[str]
) -> None:
    pki = make_pki(timedelta(days=3))
    before = serials(pki)
    kubeadm = Kubeadm(version)
    fix = rotate(pki, kubeadm)
    outcome = await fix.apply(NODE, await fix.check(NODE), steps(StepLog()))
    assert outcome.phase is Phase.SUCCEEDED
    assert kubeadm.asked[-1] == command
    assert not before.items() & serials(pki).items()  # kubeadm 1.20 knows both commands


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c16_a_kubeadm_too_old_to_renew_everything_is_refused(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    condition = await rotate(pki, Kubeadm("v1.14.10")).check(NODE)
    assert (condition.broken, condition.reason) == (False, "KubeadmTooOld")
    assert "1.15" in condition.message
    assert files(pki.directory) == before


def set_period(pki: Pki, period: str) -> None:
    config = pki.directory / "kubeadm.yaml"
    init, cluster = yaml.safe_load_all(config.read_text())
    cluster["certificateValidityPeriod"] = period
    config.write_text(yaml.safe_dump_all([init, cluster]))


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c14_the_configured_life_decides_whether_a_renewal_helps(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    fix = rotate(pki)
    before = files(pki.directory / "pki")
    for period, helps in (
        ("8760h0m0s", True),
        ("720h", True),  # 30 days
        ("240h", True),  # 10 days: due only in its last third
        ("71h", False),  # ends before the present ones do
        ("60000h", True),
        ("96000h", False),  # almost eleven years: the CA ends first
    ):
        set_period(pki, period)
        condition = await fix.check(NODE)
        assert condition.broken is helps, (period, condition.message)
        if not helps:
            reason = "CAEndsFirst" if period == "96000h" else "WouldNotHelp"
            assert condition.reason == reason, (period, condition.message)
    set_period(pki, "240h")
    refused = await rotate(pki, act_below_days=20, act_below_fraction=1.0).check(NODE)
    assert refused.reason == "WouldNotHelp"
    assert "lives 10 days" in refused.message
    assert files(pki.directory / "pki") == before


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c14_a_renewal_that_would_shorten_a_life_is_refused(make_pki: MakePki) -> None:
    """As after a patched kubeadm that made them for ten years, of which one was made anew since."""
    pki = make_pki(
        {"apiserver": timedelta(days=3), "admin.conf": timedelta(days=3000)},
        lifetime=timedelta(days=3650),
    )
    before = files(pki.directory)
    condition = await rotate(pki).check(NODE)
    assert (condition.broken, condition.reason) == (False, "WouldNotHelp")
    assert "admin.conf ends later" in condition.message
    assert files(pki.directory) == before


def test_how_a_node_joined_is_no_configuration_to_renew_with(tmp_path: Path) -> None:
    file = tmp_path / "etc/kubernetes/kubeadm.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(join_configuration("v1.20.2", "n", "192.0.2.1", "sha256:00", Settings()))
    assert find_configuration(Root(tmp_path), "", "") == ""
    file.write_text(init_configuration("v1.20.2", "n", "192.0.2.1", Settings()))
    assert find_configuration(Root(tmp_path), "", "") == "/etc/kubernetes/kubeadm.yaml"


async def test_c13_the_defaults_said_to_kubeadm_are_those_it_has(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=-1))
    before = serials(pki)
    root = Root(pki.rootfs)
    path = str(pki.binaries.kubeadm)
    real = kubeadm.Kubeadm(root, commands.run, path=path, timeout=120)
    file = pki.rootfs / "etc/defaults.yaml"
    file.write_text(default_configuration(await real.version(), root, "node-a"))
    await real.renew_all("/etc/defaults.yaml")
    assert all(before[name] != serial for name, serial in serials(pki).items())
    for minor, wanted in ((15, "v1beta2"), (21, "v1beta2"), (22, "v1beta3"), (31, "v1beta4")):
        said = list(yaml.safe_load_all(default_configuration((1, minor), root, "n")))
        assert {document["apiVersion"] for document in said} == {f"kubeadm.k8s.io/{wanted}"}
