"""Which cause a refusal names where several things fail at once."""

import os
import ssl
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import web

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import read_process
from remediator.fixes.certificates import Settings
from remediator.fixes.certificates.etcd import Member, quorum_problem
from remediator.fixes.certificates.layout import ETCD_MANIFEST, ETCD_STASH, read_layout
from remediator.fixes.certificates.restart import Restarter, RestartError
from remediator.fixes.certificates.uptake import Uptake
from tests.certificates.conftest import MakePki, StepLog
from tests.certificates.fake_api import fake_api
from tests.certificates.test_kubelet import kubelet
from tests.certificates.test_rotate import NODE, rotate, steps
from tests.cluster.pki import Pki
from tests.cluster.ports import reserved_ports

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]

PROC = Path("/proc")


def write_etcd(pki: Pki, port: int = 1) -> None:
    """A manifest of one, by default of one that does not answer."""
    manifest = pki.directory / "manifests/etcd.yaml"
    manifest.parent.mkdir(exist_ok=True)
    flags = f"--listen-client-urls=https://127.0.0.1:{port}"
    manifest.write_text(f"kind: Pod\nspec: {{containers: [{{command: [etcd, '{flags}']}}]}}\n")


async def late(method: str, path: str) -> int:
    return 504


async def test_c45_an_etcd_that_is_away_is_named_and_not_the_api_that_it_takes_along(
    make_pki: MakePki,
) -> None:
    pki = make_pki(timedelta(days=3))
    write_etcd(pki)
    async with fake_api(pki) as api:
        away = await rotate(pki, restart="none").check(NODE)
        assert (away.broken, away.reason) == (False, "EtcdUnhealthy")
        api.meddle = late
        both = await rotate(pki, restart="none").check(NODE)
        assert (both.broken, both.reason) == (False, "EtcdUnhealthy")
        assert "127.0.0.1:1/" in both.message
        assert "nor does the API answer: GET" in both.message


async def test_c45_what_is_wrong_with_a_member_is_said(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    folder = pki.directory / "pki/etcd"
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(folder / "server.crt", folder / "server.key")
    with reserved_ports(1) as (port,):
        url = f"https://127.0.0.1:{port}"

        async def answer(request: web.BaseRequest) -> web.Response:
            if request.path == "/health":
                said = {"health": "false", "reason": "ALARM NOSPACE"}
                return web.json_response(said, status=503)
            return web.json_response({"members": [{"name": "m1", "clientURLs": [url]}]})

        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        write_etcd(pki, port)
        async with fake_api(pki):
            full = await rotate(pki, restart="none").check(NODE)
        await runner.cleanup()
    assert (full.broken, full.reason) == (False, "EtcdUnhealthy")
    assert "m1 (ALARM NOSPACE) of 1" in full.message


async def test_c45_with_expired_certificates_that_is_what_recovery_is_for(
    make_pki: MakePki,
) -> None:
    pki = make_pki(timedelta(days=-1))
    write_etcd(pki)
    async with fake_api(pki) as api:
        api.meddle = late
        left = await rotate(pki, restart="none").check(NODE)
        assert left.reason == "RecoveryByPerson"
        begun = await rotate(pki, restart="none").force(NODE)
        assert begun.broken
        assert begun.detail.recovery


def test_c45_a_member_that_is_still_being_added_is_waited_for() -> None:
    learner = Member(name="m2", client_urls=("https://10.0.0.2:2379",), is_learner=True)
    assert "m2" in quorum_problem([learner], ())


async def test_c45_an_etcd_whose_members_can_not_be_asked_is_not_ended(
    make_pki: MakePki, monkeypatch: pytest.MonkeyPatch, step_log: StepLog
) -> None:
    pki = make_pki()
    root = Root(pki.rootfs)
    (pki.directory / "manifests").mkdir()
    (pki.directory / "manifests/etcd.yaml").write_text("half of it: [")
    uptake = Uptake(Settings(), root=root, procfs=PROC, clock=time.time, node_name="node-1")
    member = subprocess.Popen(["sleep", "100"])
    try:
        process = read_process(PROC, "etcd", member.pid)
        monkeypatch.setattr(Restarter, "find", lambda self, component: process)
        later = time.time() + 60
        os.utime(pki.directory / "pki/apiserver.crt", (later, later))
        async with kubelet(pki.rootfs):
            with pytest.raises(RestartError, match="does not say how its members are asked"):
                await uptake.restart(["etcd"], read_layout(root), steps(step_log))
        assert member.poll() is None
    finally:
        member.kill()
        member.wait()


async def test_c41_an_etcd_that_a_recovery_left_stopped_is_named(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    write_etcd(pki)
    manifest = pki.directory / "manifests/etcd.yaml"
    manifest.rename(pki.rootfs / ETCD_STASH.lstrip("/"))
    async with fake_api(pki):
        stopped = await rotate(pki, restart="none").check(NODE)
    assert (stopped.broken, stopped.reason) == (False, "EtcdUnhealthy")
    assert f"mv {ETCD_STASH} {ETCD_MANIFEST}" in stopped.message
