"""When the disk, the credentials, the configuration or the process itself fails (E2, E10-E15)."""

import asyncio
import base64
import json
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest

from tests.engine.support import JSON, Daemon, alert, free_port, message, running

PASSWORD = "correct horse battery staple"


def basic(user: str, password: str) -> dict[str, str]:
    value = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {**JSON, "Authorization": f"Basic {value}"}


def web_config(path: Path, password: str) -> Path:
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(6)).decode()
    path.write_text(f"basic_auth_users:\n  alertmanager: {hashed}\n")
    return path


async def test_e10_only_the_right_credentials_are_let_in_and_they_rotate(tmp_path: Path) -> None:
    file = web_config(tmp_path / "web.yml", PASSWORD)
    token = tmp_path / "token"
    token.write_text("a-bearer-token-of-some-length\n")
    config = {"webhook": {"bearer_token_file": str(token)}}
    async with running(tmp_path, flags=(f"--web.config.file={file}",), config=config) as daemon:
        body = message(alert("web-1"))
        for headers in (
            JSON,
            basic("alertmanager", "wrong"),
            basic("nobody", PASSWORD),
            {**JSON, "Authorization": "Basic !!!"},
            {**JSON, "Authorization": "Basic é"},
            {**JSON, "Authorization": "Bearer é"},
            {**JSON, "Authorization": "Bearer wrong"},
            {**JSON, "Authorization": "Bearer"},
        ):
            assert (await daemon.post(body, headers))[0] == 401, headers
            assert (await daemon.get("/metrics", headers))[0] == 401
        bearer = {**JSON, "Authorization": "Bearer a-bearer-token-of-some-length"}
        assert (await daemon.post(body, basic("alertmanager", PASSWORD)))[0] == 200
        assert (await daemon.post(body, bearer))[0] == 200
        web_config(file, "another password")
        token.write_text("another-token-of-some-length\n")
        ends = time.monotonic() + 30
        while (await daemon.post(body, basic("alertmanager", "another password")))[0] != 200:
            assert time.monotonic() < ends, daemon.log()
            await asyncio.sleep(0.3)
        assert (await daemon.post(body, basic("alertmanager", PASSWORD)))[0] == 401
        assert (await daemon.post(body, bearer))[0] == 401
        for secret in (PASSWORD, "another-token", "a-bearer-token"):
            assert secret not in daemon.log()


async def test_e10_it_refuses_to_be_open_to_everybody(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, flags=(f"--web.listen-address=:{free_port()}",)).start()
    assert daemon.process is not None
    assert daemon.process.wait(60) == 1
    assert "allow_unauthenticated" in daemon.log()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.root
async def test_e11_a_full_disk_is_503_until_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, policy={"mode": "approval"})
    daemon.journal = small_disk / "remediator.db"
    daemon.start()
    try:
        await daemon.ready()
        assert (await daemon.post(message(alert("web-1"))))[0] == 200
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
        refused = []
        for number in range(50):
            alerts = (alert(f"full-{number}-{n}") for n in range(20))
            status, _ = await daemon.post(message(*alerts))
            if status != 200:
                refused.append((number, status))
        assert refused
        assert {status for _, status in refused} == {503}
        assert "make room" in daemon.log()
        assert await daemon.metric("upkeep_journal_errors_total") >= len(refused)
        filler.unlink()
        status, _ = await daemon.post(message(alert("after")))
        assert status == 200
        pods = {r["target"]["pod"] for r in await daemon.remediations()}
        assert {"web-1", "after"} <= pods
        for number, _ in refused:  # all or nothing
            assert not any(pod.startswith(f"full-{number}-") for pod in pods)
    finally:
        daemon.stop()


@pytest.mark.root
async def test_e11_a_read_only_disk_is_503_until_it_is_writable(
    small_disk: Path, tmp_path: Path
) -> None:
    daemon = Daemon(tmp_path)
    daemon.journal = small_disk / "remediator.db"
    daemon.start()
    try:
        await daemon.ready()
        remount = ["mount", "-o", "remount"]
        subprocess.run([*remount, "-r", str(small_disk)], check=False)
        read_only = subprocess.run(
            ["touch", str(small_disk / "probe")], check=False, capture_output=True
        ).returncode
        if read_only == 0:  # open files forbid it: a lazy unmount leaves the same to see
            subprocess.run(["umount", "-l", str(small_disk)], check=True)
            shutil.rmtree(small_disk)
            small_disk.write_text("a file where the folder was\n")
        assert (await daemon.post(message(alert("web-1"))))[0] == 503
        assert (await daemon.get("/-/healthy"))[0] == 200
        if read_only == 0:
            small_disk.unlink()
            small_disk.mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small_disk)], check=True
            )
        else:
            subprocess.run([*remount, "-w", str(small_disk)], check=True)
        assert (await daemon.post(message(alert("web-1"))))[0] == 200
        assert len(await daemon.settled()) == 1
    finally:
        daemon.stop()


async def test_e11_a_corrupt_journal_is_503_until_it_is_moved_away(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.journal.parent.mkdir()
    daemon.journal.write_bytes(b"not a database, but long enough to look like a file" * 100)
    daemon.start()
    try:
        await daemon.ready()
        assert (await daemon.post(message(alert("web-1"))))[0] == 503
        assert (await daemon.get("/-/ready"))[0] == 503
        assert await daemon.metric("upkeep_journal_up") == 0
        assert "move it away" in daemon.log()
        daemon.journal.rename(daemon.journal.with_suffix(".broken"))
        assert (await daemon.post(message(alert("web-1"))))[0] == 200
        assert (await daemon.get("/-/ready"))[0] == 200
        assert len(await daemon.settled()) == 1
    finally:
        daemon.stop()


async def test_e11_a_locked_journal_is_503_until_it_is_released(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        assert (await daemon.post(message(alert("web-1"))))[0] == 200
        await daemon.settled()
        holder = sqlite3.connect(daemon.journal, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        assert (await daemon.post(message(alert("web-2"))))[0] == 503
        assert "fuser" in daemon.log()
        holder.execute("ROLLBACK")
        holder.close()
        assert (await daemon.post(message(alert("web-2"))))[0] == 200
        await daemon.settled(2)


async def test_e11_a_journal_that_was_removed_is_not_written_to_in_the_dark(tmp_path: Path) -> None:
    async with running(tmp_path, policy={"mode": "approval"}) as daemon:
        daemon.break_("web-1", "web-2")
        assert (await daemon.post(message(alert("web-1"))))[0] == 200
        for file in daemon.journal.parent.iterdir():
            file.unlink()
        assert (await daemon.post(message(alert("web-2"))))[0] == 200
        assert [r["target"]["pod"] for r in await daemon.remediations()] == ["web-2"]


async def test_e13_a_broken_configuration_leaves_the_old_one(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        good = daemon.config_file.read_text()
        daemon.config_file.write_text("fixes:\n  mend-file:\n    mood: enforce\n")
        status, text = await daemon.post(b"", {}, "/-/reload")
        assert (status, "remediator.yml:3" in text) == (500, True)
        assert await daemon.metric("upkeep_config_last_reload_successful") == 0
        daemon.break_("web-1")
        await daemon.post(message(alert("web-1")))
        (found,) = await daemon.settled()
        assert found["phase"] == "Succeeded"
        daemon.config_file.write_text(good.replace("cooldown: 0", "cooldown: 1h"))
        assert (await daemon.post(b"", {}, "/-/reload"))[0] == 200
        daemon.break_("web-1")
        await daemon.post(message(alert("web-1")))
        found = (await daemon.settled(2))[0]
        assert found["reason"] == "Cooldown"


async def test_e13_a_reload_takes_over_webhook_and_journal_too(tmp_path: Path) -> None:
    def configure(**config: object) -> None:
        daemon.write_config(config, {"mode": "approval"})

    async with running(tmp_path, policy={"mode": "approval"}) as daemon:
        daemon.break_("web-1", "web-2")  # so that they wait, for approval
        assert (await daemon.post(message(alert("web-1"))))[0] == 200
        token = tmp_path / "token"
        token.write_text("a-bearer-token-of-some-length\n")
        bearer = {**JSON, "Authorization": "Bearer a-bearer-token-of-some-length"}
        configure(
            webhook={"bearer_token_file": str(token), "max_body_bytes": 2000},
            journal={"max_active": 1},
        )
        assert (await daemon.post(b"", {}, "/-/reload"))[0] == 200
        assert (await daemon.post(message(alert("web-2"))))[0] == 401
        assert (await daemon.post(message(alert("web-2")), bearer))[0] == 503  # no room by now
        assert (await daemon.post(message(alert("web-1")), bearer))[0] == 200  # it waits already
        assert (await daemon.post(b" " * 3000, bearer))[0] == 413
        configure(webhook={"bearer_token_file": str(tmp_path / "none")})
        status, text = await daemon.post(b"", bearer, "/-/reload")
        assert (status, "none can't be read" in text) == (500, True)
        assert (await daemon.post(message(alert("web-2")), bearer))[0] == 503  # as before
        configure(webhook={"bearer_token_file": str(token)})
        assert (await daemon.post(b"", bearer, "/-/reload"))[0] == 200
        assert (await daemon.post(message(alert("web-2")), bearer))[0] == 200


async def test_e31_a_reload_never_opens_to_everybody(tmp_path: Path) -> None:
    file = web_config(tmp_path / "web.yml", PASSWORD)
    port = free_port()
    flags = (f"--web.listen-address=:{port}", f"--web.config.file={file}")
    daemon = Daemon(tmp_path, flags=flags).start()
    daemon.url = f"http://127.0.0.1:{port}"
    try:
        await daemon.ready()
        file.write_text("")
        status, text = await daemon.post(b"", basic("alertmanager", PASSWORD), "/-/reload")
        assert (status, "allow_unauthenticated" in text) == (500, True)
        ends = time.monotonic() + 30
        while "the old web configuration stays in force" not in daemon.log():
            assert time.monotonic() < ends, daemon.log()  # it looks at its files by itself, too
            await asyncio.sleep(0.3)
        assert (await daemon.post(message(alert("web-1"))))[0] == 401
        body = message(alert("web-1"))
        assert (await daemon.post(body, basic("alertmanager", PASSWORD)))[0] == 200
    finally:
        daemon.stop()


async def test_e15_by_hand_and_the_daemon_never_meet(tmp_path: Path) -> None:
    async with running(tmp_path, settings={"deadline": 600}) as daemon:
        daemon.break_("web-1", "web-2", "hold")
        await daemon.post(message(alert("web-1")))
        while daemon.acts() != ["web-1"]:
            await asyncio.sleep(0.02)
        refused = await asyncio.to_thread(daemon.cli, "run", "mend-file", "--pod=web-1")
        assert refused.returncode == 1
        assert "wait for it" in refused.stderr
        (daemon.files / "hold").unlink()
        done = await asyncio.to_thread(daemon.cli, "run", "mend-file", "--pod=web-2", "-o", "json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["phase"] == "Succeeded"
        await daemon.settled(2)
        assert sorted(daemon.acts()) == ["web-1", "web-2"]


async def test_people_approve_pause_and_resume(tmp_path: Path) -> None:
    async with running(tmp_path, policy={"mode": "approval"}) as daemon:
        daemon.break_("web-1", "web-2")
        await daemon.post(message(alert("web-1")))
        ends = time.monotonic() + 30
        while (await daemon.remediations())[0]["reason"] != "NeedsApproval":
            assert time.monotonic() < ends
            await asyncio.sleep(0.1)
        (waiting,) = await daemon.remediations()
        approved = await asyncio.to_thread(daemon.cli, "approve", waiting["id"])
        assert approved.returncode == 0, approved.stderr
        (found,) = await daemon.settled()
        assert found["phase"] == "Succeeded"
        paused = await asyncio.to_thread(daemon.cli, "pause", "mend-file", "--why=looking")
        assert "paused" in paused.stdout
        assert await daemon.metric("upkeep_remediation_paused", fix="mend-file") == 1
        by = json.loads(daemon.cli("show", found["id"], "-o", "json").stdout)["approved_by"]
        assert f"paused</span> by {by}: looking" in (await daemon.get("/"))[1]
        await daemon.post(message(alert("web-2")))
        found = (await daemon.settled(2))[0]
        assert (found["reason"], "looking" in found["message"]) == ("Paused", True)
        assert (await asyncio.to_thread(daemon.cli, "resume")).returncode == 0
        listed = await asyncio.to_thread(daemon.cli, "list", "-o", "json")
        assert [r["reason"] for r in json.loads(listed.stdout)] == ["Paused", "Mended"]


async def test_e6_a_storm_stops_at_the_breaker_until_resumed(tmp_path: Path) -> None:
    async with running(tmp_path, policy={"max_acts": 3}) as daemon:
        pods = [f"web-{n}" for n in range(20)]
        daemon.break_(*pods)
        await daemon.post(message(*map(alert, pods)))
        found = await daemon.settled(20)
        assert len(daemon.acts()) == 3
        reasons = {r["reason"] for r in found if r["phase"] == "Skipped"}
        assert reasons == {"StormBreaker"}
        await asyncio.to_thread(daemon.cli, "resume", "mend-file")
        left = next(pod for pod in pods if (daemon.files / pod).exists())
        await daemon.post(message(alert(left)))
        ends = time.monotonic() + 60
        while len(daemon.acts()) < 4 or (daemon.files / left).exists():
            assert time.monotonic() < ends, daemon.log()
            await asyncio.sleep(0.05)
        await daemon.settled(20)
        assert daemon.acts()[3:] == [left]


async def test_a_failure_pauses_the_fix_until_it_is_resumed(tmp_path: Path) -> None:
    policy = {"pause_after_failure": True}
    async with running(tmp_path, policy=policy, settings={"misbehave": "fail"}) as daemon:
        daemon.break_("web-1", "web-2")
        await daemon.post(message(alert("web-1")))
        (failed,) = await daemon.settled()
        assert (failed["phase"], failed["reason"]) == ("Failed", "Refused")
        assert await daemon.metric("upkeep_remediation_paused", fix="mend-file") == 1
        await daemon.post(message(alert("web-2")))
        refused = (await daemon.settled(2))[0]
        assert (refused["phase"], refused["reason"]) == ("Skipped", "PreviousFailed")
        assert failed["id"] in refused["message"]
        daemon.write_config(policy=policy)  # what made it fail is mended
        assert (await daemon.post(b"", {}, "/-/reload"))[0] == 200
        await asyncio.to_thread(daemon.cli, "resume", "mend-file")
        await daemon.post(message(alert("web-2")))
        mended = (await daemon.settled(3))[0]
        assert (mended["phase"], mended["target"]["pod"]) == ("Succeeded", "web-2")


async def test_a_graceful_stop_leaves_what_runs_to_the_next_start(tmp_path: Path) -> None:
    config = {"shutdown_grace": "1s"}
    daemon = Daemon(tmp_path, settings={"delay": 60, "deadline": 90}, config=config).start()
    await daemon.ready()
    daemon.break_("web-1")
    await daemon.post(message(alert("web-1")))
    while daemon.acts() != ["web-1"]:
        await asyncio.sleep(0.02)
    assert daemon.stop() == 0
    daemon.start()
    await daemon.ready()
    (found,) = await daemon.settled()
    assert (found["phase"], found["message"]) == ("Succeeded", "finished after a crash")
    assert daemon.acts() == ["web-1"]
    daemon.stop()


async def test_e1_e2_killed_at_random_points_nothing_is_lost_or_done_twice(
    tmp_path: Path, seed: int, soak: bool
) -> None:
    """`kill -9` again and again under a stream of webhooks; then every accepted one is mended."""
    choice = random.Random(seed)
    rounds = 200 if soak else 5
    daemon = Daemon(tmp_path, settings={"delay": 0.02})
    accepted: set[str] = set()
    number = 0
    for turn in range(rounds):
        daemon.start()
        await daemon.ready()
        ends = time.monotonic() + choice.uniform(0.05, 1.5)

        async def stream(ends: float = ends) -> None:
            nonlocal number
            while time.monotonic() < ends:
                pods = [f"web-{number + n}" for n in range(5)]
                number += 5
                daemon.break_(*pods)
                status, _ = await daemon.post(message(*map(alert, pods)))
                assert status == 200
                accepted.update(pods)
                await asyncio.sleep(0.1)  # a stream, and not more than is mended in a minute

        killing = asyncio.create_task(stream())
        await asyncio.sleep(ends - time.monotonic() - choice.uniform(0, 0.05))
        daemon.kill()
        await asyncio.gather(killing, return_exceptions=True)
        print(f"crash {turn + 1} of {rounds}: {len(accepted)} accepted", flush=True)
    daemon.start()
    await daemon.ready()
    found = await daemon.settled(min(1000, len(accepted)), timeout=300)
    assert {r["phase"] for r in found} == {"Succeeded"}
    acts = daemon.acts()
    assert len(acts) == len(set(acts))
    assert accepted <= set(acts)
    assert not [pod for pod in accepted if (daemon.files / pod).exists()]
    daemon.stop()
