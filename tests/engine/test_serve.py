"""The daemon as a whole, as a process: from the webhook to the record."""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest

from tests.engine.support import Daemon, alert, killed_while_acting, message, running


async def test_an_alert_becomes_one_mended_target(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        daemon.break_("web-1")
        status, text = await daemon.post(message(alert("web-1")))
        assert (status, json.loads(text)["accepted"]) == (200, 1)
        (found,) = await daemon.settled()
        assert (found["phase"], found["reason"]) == ("Succeeded", "Mended")
        assert daemon.acts() == ["web-1"]
        assert not (daemon.files / "web-1").exists()
        _, text = await daemon.get(f"/api/v1/remediations/{found['id']}")
        whole = json.loads(text)
        assert [(s["name"], s["ok"]) for s in whole["steps"]] == [("mend", True)]
        assert whole["alerts"][0]["name"] == "FileThere"
        total = {"fix": "mend-file", "phase": "Succeeded", "reason": "Mended"}
        assert await daemon.metric("upkeep_remediations_total", **total) == 1
        active = {"fix": "mend-file", "phase": "Running"}
        assert await daemon.metric("upkeep_remediations_active", **active) == 0
        assert await daemon.metric("upkeep_webhook_requests_total", code="503") == 0


async def test_one_id_leads_through_the_log(tmp_path: Path) -> None:
    async with running(tmp_path, flags=("--log.format=json",)) as daemon:
        daemon.break_("web-1")
        _, text = await daemon.post(message(alert("web-1")))
        await daemon.settled()
        lines = [json.loads(line) for line in daemon.log().splitlines()]
    request_id = json.loads(text)["id"]
    mine = [
        line["event"]
        for line in lines
        if line.get("request") == request_id
        or str(line.get("remediation", "")).startswith(request_id)
    ]
    assert mine == ["accepted", "admitted", "running", "step", "step ended", "ended"]


async def test_e1_killed_between_200_and_the_act_it_is_done_once(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, policy={"mode": "approval"}).start()
    await daemon.ready()
    daemon.break_("web-1")
    status, _ = await daemon.post(message(alert("web-1")))
    assert status == 200
    daemon.kill()
    assert daemon.acts() == []
    daemon.write_config()
    daemon.start()
    await daemon.ready()
    (found,) = await daemon.settled()
    assert (found["phase"], daemon.acts()) == ("Succeeded", ["web-1"])
    daemon.stop()


async def test_e2_killed_while_acting_it_is_resumed_and_not_repeated(tmp_path: Path) -> None:
    daemon = await killed_while_acting(tmp_path)
    daemon.start()
    await daemon.ready()
    (found,) = await daemon.settled()
    assert (found["phase"], found["message"]) == ("Succeeded", "finished after a crash")
    assert daemon.acts() == ["web-1"]
    daemon.stop()


async def test_e14_dry_run_writes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, flags=("--dry-run",)) as daemon:
        daemon.break_("web-1")
        before = sorted((p.name, p.stat().st_mtime_ns) for p in daemon.files.iterdir())
        await daemon.post(message(alert("web-1")))
        (found,) = await daemon.settled()
        assert (found["phase"], found["reason"]) == ("Skipped", "DryRun")
        assert "remove the file of web-1" in found["message"]
        assert sorted((p.name, p.stat().st_mtime_ns) for p in daemon.files.iterdir()) == before


@pytest.mark.parametrize("misbehave", ["fail", "raise", "leave", "check-error", "check-raise"])
async def test_every_way_to_fail_ends_in_words(tmp_path: Path, misbehave: str) -> None:
    expected = {
        "fail": ("Failed", "Refused"),
        "raise": ("Failed", "InternalError"),
        "leave": ("Failed", "StillBroken"),
        "check-error": ("Skipped", "CheckFailed"),
        "check-raise": ("Skipped", "CheckFailed"),
    }
    async with running(tmp_path, settings={"misbehave": misbehave}) as daemon:
        daemon.break_("web-1")
        await daemon.post(message(alert("web-1")))
        (found,) = await daemon.settled()
        assert (found["phase"], found["reason"]) == expected[misbehave]
        assert found["message"]
        labels = {"fix": "mend-file", "phase": found["phase"], "reason": found["reason"]}
        assert await daemon.metric("upkeep_remediations_total", **labels) == 1


async def test_a_fix_that_hangs_is_cancelled_at_its_deadline(tmp_path: Path) -> None:
    settings = {"misbehave": "hang", "deadline": 0.5}
    async with running(tmp_path, settings=settings) as daemon:
        daemon.break_("web-1")
        await daemon.post(message(alert("web-1")))
        (found,) = await daemon.settled()
        assert (found["phase"], found["reason"]) == ("Failed", "DeadlineExceeded")


async def test_e56_what_waits_is_shown_whatever_came_after_it(tmp_path: Path) -> None:
    """A hundred refusals of others must not hide the one that waits for a person."""
    async with running(tmp_path, policy={"mode": "approval"}) as daemon:
        daemon.break_("web-1")
        await daemon.post(message(alert("web-1")))
        while not (waits := await daemon.remediations("?phase=Pending")) or (
            waits[0]["reason"] != "NeedsApproval"
        ):
            await asyncio.sleep(0.05)
        await daemon.post(message(*(alert(f"healthy-{number}") for number in range(105))))
        while len(await daemon.remediations("?phase=Pending")) > 1:
            await asyncio.sleep(0.05)
        status, page = await daemon.get("/")
        active = page.partition("<h2>Active (1)</h2>")[2].partition("<h2>History</h2>")[0]
        assert status == 200
        assert waits[0]["id"] in active
        assert "NeedsApproval" in active


async def test_what_is_true_only_now_is_kept_by_nobody(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon, aiohttp.ClientSession() as session:
        await daemon.post(message(alert("web-1")))  # from here on there is a journal to show
        for path in ("/", "/api/v1/remediations"):
            async with session.get(daemon.url + path) as answer:
                assert answer.headers["Cache-Control"] == "no-store"
        async with session.get(daemon.url) as answer:
            policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
