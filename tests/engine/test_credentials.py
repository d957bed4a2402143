"""E10: secrets are compared in constant time by construction, whoever asks, and nowhere else.

A clock on a busy machine proves nothing: the comparators themselves are recorded instead.
"""

import base64
import hmac
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import bcrypt
import pytest
from aiohttp import web

from exporter.web_auth import Access

PASSWORD, TOKEN = "correct horse battery staple", "a-bearer-token-of-some-length"
HASHED = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).decode()

Compared = list[tuple[bytes, bytes]]


def access() -> Access:
    return Access(users={"alertmanager": HASHED}, bearer=TOKEN)


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


async def status(asked: Access, authorization: str | None) -> int:
    """200 for who is let in."""
    headers = {} if authorization is None else {"Authorization": authorization}
    request = cast("web.Request", SimpleNamespace(headers=headers))  # as aiohttp decodes them
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
