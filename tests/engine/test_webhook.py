"""The webhook as Alertmanager and everybody else may use it: hazards E3, E7, E8, E9 and fuzzing."""

import asyncio
import json
import random
import string
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.engine.support import JSON, NODE, Daemon, alert, message, running


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path, config={"webhook": {"body_timeout": "2s"}}) as started:
        yield started


async def test_e7_forged_labels_for_a_healthy_target_do_nothing(daemon: Daemon) -> None:
    await daemon.post(message(alert("healthy")))
    (found,) = await daemon.settled()
    assert (found["phase"], found["reason"]) == ("Skipped", "ConditionCleared")
    assert daemon.acts() == []


async def test_e8_alerts_of_others_are_counted_and_not_journaled(tmp_path: Path) -> None:
    async with running(tmp_path, flags=("--cluster=prod",)) as daemon:
        daemon.break_("web-1")
        body = message(
            alert("web-1", node="node-2"),
            alert("web-1", cluster="staging"),
            alert("web-1", fix="unheard-of"),
        )
        status, text = await daemon.post(body)
        assert status == 200
        answer = json.loads(text)
        del answer["id"]
        assert answer == {"other_node": 1, "other_cluster": 1, "not_for_us": 1}
        while (await daemon.get("/-/ready"))[0] != 200:  # its journal is made at its first look
            await asyncio.sleep(0.05)
        assert await daemon.remediations() == []
        assert await daemon.metric("upkeep_webhook_alerts_total", outcome="other_node") == 1
        await daemon.post(message(alert("web-1", cluster="prod")))
        (found,) = await daemon.settled()
        assert found["phase"] == "Succeeded"
        _, text = await daemon.post(message(alert("web-2")))
        assert json.loads(text)["accepted"] == 1  # which may be ours: the look at it decides


async def test_a_bad_alert_does_not_lose_the_good_ones(daemon: Daemon) -> None:
    daemon.break_("web-1")
    nameless = alert("web-1")
    del nameless["labels"]["pod"]
    bad: list[Any] = [
        nameless,
        alert("Not/A/Name"),
        alert("web-1", status="unsure"),
        alert("web-1", starts_at="yesterday"),
        alert("web-1", starts_at="2026-01-02T03:04:05"),
        alert("web-1", starts_at="9999-12-31T23:59:59-12:00"),
        alert("web-1", starts_at="0001-01-01T00:00:00+12:00"),
        {"labels": 7},
        None,
    ]
    status, text = await daemon.post(message(*bad, alert("web-1")))
    assert status == 200
    answer = json.loads(text)
    assert (answer["accepted"], answer["invalid"]) == (1, 9)
    (found,) = await daemon.settled()
    assert found["phase"] == "Succeeded"
    assert "no label 'pod'" in daemon.log()


async def test_e9_unknown_fields_and_truncation(daemon: Daemon) -> None:
    body = message(alert("web-1"), truncatedAlerts=7, notificationReason="new in 0.34")
    status, text = await daemon.post(body)
    assert (status, json.loads(text)["truncated"]) == (200, 7)
    assert await daemon.metric("upkeep_webhook_alerts_total", outcome="truncated") == 7
    assert "max_alerts: 0" in daemon.log()


async def test_e9_a_count_without_end_is_counted_as_many(daemon: Daemon) -> None:
    """It was an error after the commit, so that Alertmanager would send the message for ever."""
    body = message(alert("web-1")).replace(
        b'"truncatedAlerts": 0', b'"truncatedAlerts": ' + b"9" * 400
    )
    status, text = await daemon.post(body)
    assert (status, json.loads(text)["accepted"]) == (200, 1)
    assert await daemon.metric("upkeep_webhook_alerts_total", outcome="truncated") == 1e9


async def test_e9_what_will_never_be_right_is_4xx(daemon: Daemon) -> None:
    good = message(alert("web-1"))
    for body, headers, expected in (
        (b"", JSON, 400),
        (b"{", JSON, 400),
        (b"[]", JSON, 400),
        (b'{"version":"5","alerts":[]}', JSON, 400),
        (b'{"version":"4"}', JSON, 400),
        (b'{"version":"4","alerts":[NaN]}', JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b'{"version":"4","alerts":[' + b"[" * 50_000 + b"]" * 50_000 + b"]}", JSON, 400),
        (good.decode().encode("utf-16"), JSON, 400),
        (b'{"version":"4","alerts":["\xff"]}', JSON, 200),
        (good, {"Content-Type": "text/plain"}, 415),
        (good, {**JSON, "Content-Encoding": "gzip"}, 415),
    ):
        status, text = await daemon.post(body, headers)
        assert status == expected, (body[:50], text)
        assert "Traceback" not in text
    duplicate = good.replace(b'"version": "4"', b'"version": "4", "version": "4"')
    assert (await daemon.post(duplicate))[0] == 200
    assert (await daemon.get("/-/healthy"))[0] == 200


async def test_e9_a_huge_group_is_taken_whole(daemon: Daemon) -> None:
    body = message(*(alert(f"web-{n % 50}", number=str(n)) for n in range(20_000)))
    status, text = await daemon.post(body)
    assert (status, json.loads(text)["accepted"]) == (200, 20_000)
    assert len(await daemon.settled(50)) == 50


async def test_e9_more_values_than_a_message_has_are_not_made_objects_of(daemon: Daemon) -> None:
    """30 MB of them would take 1.3 GB, and the event loop for 16 s."""
    body = b'{"version":"4","alerts":[' + b"1," * 15_000_000 + b"1]}"
    begun = time.monotonic()
    status, text = await daemon.post(body)
    assert (status, "more than 3000000 values" in text) == (400, True)
    assert time.monotonic() - begun < 10
    assert (await daemon.post(message(alert("web-1"))))[0] == 200


async def test_e9_100_megabytes_are_refused_and_not_kept(daemon: Daemon) -> None:
    assert daemon.process is not None
    before = psutil.Process(daemon.process.pid).memory_info().rss

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    async with aiohttp.ClientSession() as session:
        try:
            async with session.post(
                f"{daemon.url}/webhook", data=chunks(), headers=JSON
            ) as response:
                assert response.status == 413
        except aiohttp.ClientError:  # it hangs up on who goes on sending: that's a refusal too
            pass
    status, _ = await daemon.post(b" " * (33 << 20))
    assert status == 413
    assert psutil.Process(daemon.process.pid).memory_info().rss - before < 200 << 20
    assert (await daemon.post(message(alert("web-1"))))[0] == 200


async def test_e9_slow_clients_do_not_starve_the_others(daemon: Daemon) -> None:
    """Two hundred that send one byte and wait; a good one is answered meanwhile, in no time."""
    slow = []
    head = (
        b"POST /webhook HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    for number in range(200):
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(head if number % 2 else b"POST /web")
        slow.append((reader, writer))
    begun = time.monotonic()
    assert (await daemon.post(message(alert("web-1"))))[0] == 200
    assert time.monotonic() - begun < 10
    for number in (1, 3, 199):  # those in the middle of a body: told to come again
        line = await asyncio.wait_for(slow[number][0].readline(), 30)
        assert b" 503 " in line
    # Those in the middle of a head: hung up on.
    assert await asyncio.wait_for(slow[0][0].read(), 60) == b""
    for _, writer in slow:
        writer.close()


async def test_fuzzed_requests_find_no_500(daemon: Daemon, seed: int, soak: bool) -> None:
    """Mutated messages, paths, headers and queries; no answer is a 5xx, nothing acts."""
    choice = random.Random(seed)
    cases = 100_000 if soak else 1500
    good = message(*(alert(f"web-{n}") for n in range(3)))

    async def ask(session: aiohttp.ClientSession, case: Case) -> None:
        method, path, body, headers = case
        try:
            async with session.request(
                method, daemon.url + path, data=body, headers=headers
            ) as response:
                text = await response.text(errors="replace")
                assert response.status < 500, (method, path, body, headers, text)
        except (aiohttp.ClientError, ValueError):
            pass  # the client itself, or the HTTP parser, refused it

    async with aiohttp.ClientSession() as session:
        for number in range(0, cases, 50):
            await asyncio.gather(*(ask(session, _case(choice, good)) for _ in range(50)))
            if soak and number % 5000 == 0:
                print(f"fuzzed {number} of {cases}", flush=True)
    assert (await daemon.get("/-/healthy"))[0] == 200
    assert daemon.acts() == []
    assert "Traceback" not in daemon.log()


Case = tuple[str, str, bytes | None, dict[str, str]]
"""Method, path, body, headers."""


def _case(choice: random.Random, good: bytes) -> Case:
    kind = choice.randrange(4)
    if kind == 0:  # bytes of a good message changed
        body = bytearray(good)
        for _ in range(choice.randint(1, 20)):
            body[choice.randrange(len(body))] = choice.randrange(256)
        return "POST", "/webhook", bytes(body), dict(JSON)
    if kind == 1:  # another value somewhere in the structure
        value = json.loads(good)
        _mutate(choice, value)
        return "POST", "/webhook", json.dumps(value).encode(), dict(JSON)
    if kind == 2:  # the API
        names = ("fix", "phase", "target", "limit", "id", "x")
        pairs = [f"{choice.choice(names)}={_word(choice)}" for _ in range(choice.randrange(4))]
        path = choice.choice(("/api/v1/remediations", "/", f"/api/v1/remediations/{_word(choice)}"))
        return "GET", f"{path}?{'&'.join(pairs)}", None, {}
    method = choice.choice(("GET", "PUT", "DELETE", "POST", "HEAD", "OPTIONS"))
    headers = {"Content-Type": _word(choice) or "x", "X-Thing": _word(choice)}
    return method, f"/{_word(choice)}", choice.randbytes(choice.randrange(50)), headers


def _word(choice: random.Random) -> str:
    alphabet = string.ascii_letters + string.digits + "%._-~*'\"\\<>é"
    return "".join(choice.choice(alphabet) for _ in range(choice.randrange(12)))


def _mutate(choice: random.Random, value: Any) -> None:
    odd: list[Any] = [None, -1, 1e308, 10**30, "", "x" * 5000, [], {}, True, "\x00", "\ud800", [[]]]
    where = value
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            return
        key = choice.choice(keys)
        below = where[key]
        if isinstance(below, dict | list) and below and choice.random() < 0.8:
            where = below
            continue
        where[key] = choice.choice(odd)
        return


async def test_e3_alerts_repeated_and_late_are_one_act(daemon: Daemon) -> None:
    daemon.break_("web-1")
    bodies = [message(alert("web-1"))] * 20
    answers = await asyncio.gather(*(daemon.post(body) for body in bodies))
    assert {status for status, _ in answers} == {200}
    await daemon.settled()
    await daemon.post(message(alert("web-1")))
    await daemon.settled()
    assert daemon.acts() == ["web-1"]


async def test_e5_resolved_undoes_nothing(daemon: Daemon) -> None:
    daemon.break_("web-1")
    await daemon.post(message(alert("web-1")))
    before = await daemon.settled()
    status, text = await daemon.post(message(alert("web-1", status="resolved")))
    assert (status, json.loads(text)["resolved"]) == (200, 1)
    await asyncio.sleep(1.5)
    assert await daemon.remediations() == before
    assert not (daemon.files / "web-1").exists()


async def test_e16_hostile_labels_are_inert_everywhere(tmp_path: Path) -> None:
    """Names are held to Kubernetes' grammar; alert names are free text and must be escaped."""
    hostile = "<script>alert(1)</script>\x1b[31m\u202e\n"
    async with running(tmp_path) as daemon:
        daemon.break_("web-1")
        await daemon.post(
            message(alert("web-1", alertname=hostile), alert(hostile), alert("x", node=hostile))
        )
        (found,) = await daemon.settled()
        _, page = await daemon.get(f"/?id={found['id']}")
        assert "&lt;script&gt;alert(1)" in page
        assert "<script" not in page
        shown = daemon.cli("show", found["id"]).stdout
        assert "alert(1)" in shown
        for text in (page, shown, daemon.log()):
            assert "\x1b" not in text
            assert "\u202e" not in text
        _, again = await daemon.get('/?id="><script>x</script>')
        assert "<script" not in again


async def test_the_api_filters(daemon: Daemon) -> None:
    daemon.break_("web-1")
    await daemon.post(message(alert("web-1"), alert("web-2")))
    await daemon.settled(2)
    (found,) = await daemon.remediations("?phase=Succeeded")
    assert found["target"] == {
        "node": NODE,
        "pod": "web-1",
        "namespace": "",
        "container": "",
        "deployment": "",
    }
    assert len(await daemon.remediations("?target=web-2&fix=mend-file")) == 1
    assert len(await daemon.remediations("?limit=1")) == 1
    for query in ("?phase=Done", "?limit=0", "?limit=x", "?unknown=1", "?limit=0000010009999999"):
        assert (await daemon.get(f"/api/v1/remediations{query}"))[0] == 400
    assert (await daemon.get("/api/v1/remediations/none"))[0] == 404
