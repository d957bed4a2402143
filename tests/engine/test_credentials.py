"""E10: secrets are compared in constant time by construction, whoever asks, and nowhere else.

A clock on a busy machine proves nothing: the comparators themselves are recorded instead.
"""

import asyncio
import base64
import hmac
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import bcrypt
import pytest
from aiohttp import web

from exporter.web_auth import Access
from exporter.web_config import load

PASSWORD, TOKEN = "correct horse battery staple", "a-bearer-token-of-some-length"
HASHED = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).decode()

Compared = list[tuple[bytes, bytes]]


def access() -> Access:
    return Access(users={"alertmanager": HASHED}, bearer=TOKEN)


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


async def status(asked: Access, authorization: str | None, remote: str = "192.0.2.1") -> int:
    """200 for who is let in."""
    headers = {} if authorization is None else {"Authorization": authorization}
    asks = SimpleNamespace(headers=headers, remote=remote)
    request = cast("web.Request", asks)  # as aiohttp decodes them
    refusal = await asked.refusal(request)
    return 200 if refusal is None else refusal.status


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> Compared:
    """What hmac.compare_digest is asked."""
    seen: Compared = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    return seen


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> Compared:
    """What bcrypt.checkpw is asked."""
    seen: Compared = []
    real: Callable[[bytes, bytes], bool] = bcrypt.checkpw

    def check(password: bytes, hashed: bytes) -> bool:
        seen.append((password, hashed))
        return real(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", check)
    return seen


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (f"Bearer {TOKEN}", 200),
        ("Bearer wrong", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Bearer {TOKEN * 100}", 401),
        ("Bearer", 401),
        ("Bearer \udce9", 401),  # a byte that is no text
        ("Digest x", 401),
        (basic("nobody", PASSWORD), 401),
        (None, 401),
    ],
)
async def test_e10_a_token_is_compared_once_and_as_a_digest_whatever_came(
    digests: Compared, authorization: str | None, expected: int
) -> None:
    assert await status(access(), authorization) == expected
    ((given, wanted),) = digests
    assert len(given) == len(wanted) == 32  # neither length nor first letters make a difference
    assert TOKEN.encode() not in given + wanted


@pytest.mark.parametrize(
    ("user", "password", "expected"),
    [
        ("alertmanager", PASSWORD, 200),
        ("alertmanager", "wrong", 401),
        ("alertmanager", "", 401),
        ("alertmanager", PASSWORD * 10, 401),
        ("nobody", PASSWORD, 401),
        ("", PASSWORD, 401),
        ("", "", 401),
    ],
)
async def test_e10_an_unknown_user_costs_the_same_bcrypt_as_a_wrong_password(
    hashes: Compared, user: str, password: str, expected: int
) -> None:
    assert await status(access(), basic(user, password)) == expected
    ((_, hashed),) = hashes
    assert hashed[:7] == HASHED.encode()[:7]  # the same cost for everybody
    assert (hashed == HASHED.encode()) is (user == "alertmanager")


async def test_e10_there_is_no_way_in_but_by_these_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = access()
    monkeypatch.setattr(hmac, "compare_digest", lambda *_: False)
    monkeypatch.setattr(bcrypt, "checkpw", lambda *_: False)
    assert await status(asked, f"Bearer {TOKEN}") == 401
    assert await status(asked, basic("alertmanager", PASSWORD)) == 401
    monkeypatch.setattr(bcrypt, "checkpw", lambda *_: True)
    assert await status(asked, basic("nobody", PASSWORD)) == 401  # whatever its stand-in says


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No password is checked before this is set."""
    go = threading.Event()
    real: Callable[[bytes, bytes], bool] = bcrypt.checkpw
    monkeypatch.setattr(bcrypt, "checkpw", lambda *given: go.wait(30) and real(*given))
    yield go
    go.set()


async def flood(asked: Access, remotes: list[str]) -> list["asyncio.Task[int]"]:
    """Wrong passwords that wait, or are refused at once; one for each of `remotes`."""
    begun = [
        asyncio.create_task(status(asked, basic("alertmanager", f"wrong{n}"), remote))
        for n, remote in enumerate(remotes)
    ]
    await asyncio.sleep(0.1)
    return begun


async def test_e52_a_flood_of_wrong_passwords_does_not_shut_out_who_is_known(
    slow: threading.Event,
) -> None:
    asked = access()
    slow.set()
    assert await status(asked, basic("alertmanager", PASSWORD)) == 200
    for number in range(300):  # more than are kept
        assert await status(asked, basic(f"nobody{number}", PASSWORD)) == 401
    slow.clear()
    waiting = await flood(asked, [f"198.51.100.{n}" for n in range(60)])
    assert sum(task.done() and task.result() == 503 for task in waiting) == 28
    async with asyncio.timeout(5):
        assert await status(asked, basic("alertmanager", PASSWORD)) == 200
    slow.set()
    assert {await task for task in waiting} == {401, 503}


@pytest.mark.parametrize("hosts", ["198.51.100.7", "2001:db8::{:x}"])
async def test_e52_nor_who_comes_for_the_first_time_from_elsewhere(
    slow: threading.Event, hosts: str
) -> None:
    asked = access()
    waiting = await flood(asked, [hosts.format(n) for n in range(40)])
    right = asyncio.create_task(status(asked, basic("alertmanager", PASSWORD), "192.0.2.1"))
    await asyncio.sleep(0.1)
    assert not right.done()
    slow.set()
    assert await right == 200
    assert [await task for task in waiting].count(503) == 32


async def test_e52_one_who_comes_many_times_at_once_is_checked_once(hashes: Compared) -> None:
    """Alertmanager after a restart, with fifty groups at a time."""
    asked = access()
    many = (status(asked, basic("alertmanager", PASSWORD)) for _ in range(50))
    assert set(await asyncio.gather(*many)) == {200}
    assert len(hashes) == 1


async def test_e52_a_client_that_goes_away_takes_no_other_with_it(slow: threading.Event) -> None:
    asked = access()
    gone, stays = (
        asyncio.create_task(status(asked, basic("alertmanager", PASSWORD))) for _ in range(2)
    )
    await asyncio.sleep(0.1)
    gone.cancel()
    await asyncio.sleep(0.1)
    slow.set()
    assert await stays == 200


async def test_e52_what_is_wrong_stays_wrong_without_another_bcrypt(hashes: Compared) -> None:
    asked = access()
    for _ in range(3):
        assert await status(asked, basic("alertmanager", "wrong")) == 401
    assert await status(asked, basic("alertmanager", PASSWORD)) == 200
    assert len(hashes) == 2


def test_e52_reading_the_file_computes_no_hash_of_its_cost(
    tmp_path: Path, hashes: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred users of cost 14 would hold up the event loop for two minutes, at each reload."""
    monkeypatch.setattr(bcrypt, "hashpw", lambda *_: pytest.fail("computed"))
    file = tmp_path / "web.yml"
    file.write_text(f"basic_auth_users: {{ada: {HASHED.replace('$05$', '$14$')}}}\n")
    Access(users=load(file).basic_auth_users)
    assert {hashed[4:6] for _, hashed in hashes} <= {b"04"}


async def test_e52_where_costs_differ_an_unknown_user_costs_one_of_them_always_the_same(
    hashes: Compared,
) -> None:
    asked = Access(users={"a": HASHED, "b": HASHED.replace("$05$", "$06$")})
    for number in range(30):
        for word in ("x", "y"):
            assert await status(asked, basic(f"nobody{number}", word)) == 401
    costs = [hashed[4:6] for _, hashed in hashes]
    assert costs[::2] == costs[1::2]
    assert set(costs) == {b"05", b"06"}
