"""etcd's list of members, read from the database of a real one, whatever state that is in."""

import json
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from deploy.local.debian import binary
from remediator.fixes.certificates.members import MembersError, read_members
from tests.cluster.ports import reserved_ports
from tests.cluster.processes import Component

pytestmark = pytest.mark.debian


class Member:
    """A running etcd."""

    def __init__(self, directory: Path, client: int, peer: int) -> None:
        self.data = directory / "data"
        self.client = f"http://127.0.0.1:{client}"
        self.peer = f"http://127.0.0.1:{peer}"
        command = [
            str(binary("etcd")),
            "--name=first",
            f"--data-dir={self.data}",
            f"--listen-client-urls={self.client}",
            f"--advertise-client-urls={self.client}",
            f"--listen-peer-urls={self.peer}",
            f"--initial-advertise-peer-urls={self.peer}",
            f"--initial-cluster=first={self.peer}",
        ]
        self.process = Component("etcd", command, log=directory / "log", healthy=self.leads)

    @property
    def database(self) -> Path:
        return self.data / "member/snap/db"

    def leads(self) -> bool:
        return self.ctl("endpoint", "health", check=False).returncode == 0

    def ctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binary("etcdctl"), f"--endpoints={self.client}", *words],
            env={"ETCDCTL_API": "3"},
            check=check,
            capture_output=True,
            text=True,
        )

    def listed(self) -> list[str]:
        """What it says itself."""
        said = json.loads(self.ctl("member", "list", "--write-out=json").stdout)
        return sorted(member.get("name", "") for member in said["members"])


@contextmanager
def member(directory: Path) -> Iterator[Member]:
    with reserved_ports(2) as (client, peer):
        found = Member(directory, client, peer)
        found.process.launch()
        try:
            found.process.wait_healthy(60)
            yield found
        finally:
            found.process.stop()


def names(database: Path) -> list[str]:
    return sorted(found.name for found in read_members(database, pause=lambda _: None))


def test_c26_a_member_that_was_alone_is_so_no_more_once_another_was_added(tmp_path: Path) -> None:
    with member(tmp_path) as etcd:
        assert names(etcd.database) == etcd.listed() == ["first"]
        for number in range(60):  # enough for branches, and for pages that are used again
            etcd.ctl("put", f"key{number}", "x" * 2000)
            if number % 10 == 0:
                assert names(etcd.database) == ["first"]
        etcd.ctl("member", "add", "second", "--peer-urls=http://127.0.0.1:1")
        deadline = time.monotonic() + 30  # etcd writes ten times a second
        while names(etcd.database) == ["first"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        etcd.process.stop(kill=True)
        assert names(etcd.database) == ["", "first"]  # it never started: it has no name yet
        assert not etcd.leads()
    assert read_members(etcd.database)[0].peer_urls


def test_c26_a_list_that_is_not_whole_proves_nothing(tmp_path: Path, seed: int) -> None:
    with member(tmp_path) as etcd:
        for number in range(3):
            etcd.ctl(
                "member",
                "add",
                f"m{number}",
                f"--peer-urls=http://127.0.0.1:{number + 1}",
                "--learner",
                check=False,
            )  # one learner, the rest are refused
        etcd.process.stop()
    whole = etcd.database.read_bytes()
    assert names(etcd.database) == ["", "first"]
    broken = tmp_path / "broken"
    for size in (0, 10, 4096, 8192, 12288):
        broken.write_bytes(whole[:size])
        with pytest.raises(MembersError):
            read_members(broken, pause=lambda _: None)
    # The meta pages, after their headers: nothing of them is guessed, and neither stands for the
    # other, for the older one may not know of the learner yet.
    for offset in (*range(16, 80), *range(4096 + 16, 4096 + 80)):
        data = bytearray(whole)
        data[offset] ^= 1
        broken.write_bytes(data)
        with pytest.raises(MembersError):
            read_members(broken, pause=lambda _: None)
    chance = random.Random(seed)
    used = len(whole.rstrip(b"\0"))
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(50):
            data[chance.randrange(used)] = chance.randrange(256)
        broken.write_bytes(data)
        with suppress(MembersError):
            assert len(read_members(broken, pause=lambda _: None)) == 2
    with pytest.raises(MembersError, match="No such file"):
        read_members(tmp_path / "nothing", pause=lambda _: None)
    shutil.rmtree(etcd.data)
