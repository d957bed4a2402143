"""Copies of admin.conf that hold more than admin.conf does, or are not what they seem."""

import os
from datetime import timedelta

import pytest
import yaml

from exporter.checks.certificates import Root
from remediator.fixes.certificates.copies import renew_copy
from remediator.fixes.certificates.settings import Settings
from tests.certificates.conftest import MakePki
from tests.cluster.pki import Pki, set_remaining

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]

COPY = "/root/.kube/config"


class Home:
    """A copy of admin.conf from before its renewal."""

    def __init__(self, pki: Pki) -> None:
        self.pki = pki
        self.root = Root(pki.rootfs)
        self.admin = pki.directory / "admin.conf"
        self.old = self.admin.read_bytes()
        self.copy = pki.rootfs / COPY.lstrip("/")
        self.kept = self.copy.with_name("config.old")
        self.copy.parent.mkdir(parents=True)
        self.copy.write_bytes(self.old)
        set_remaining(pki.directory, {"admin.conf": timedelta(days=300)})
        self.new = self.admin.read_bytes()

    def renew(self) -> str:
        return renew_copy(self.root, COPY)


@pytest.fixture
def home(make_pki: MakePki) -> Home:
    return Home(make_pki())


def test_c57_other_contexts_names_and_comments_stay(home: Home) -> None:
    document = yaml.safe_load(home.old)
    document["clusters"].append({"name": "other", "cluster": {"server": "https://other:6443"}})
    document["users"].append({"name": "other", "user": {"token": "secret"}})
    document["contexts"][0]["context"]["namespace"] = "mine"
    document["contexts"][0]["name"] = "renamed"
    document["contexts"].append({"name": "o", "context": {"cluster": "other", "user": "other"}})
    document["current-context"] = "o"
    text = "# what I am used to\n" + yaml.safe_dump(document, width=100_000)
    home.copy.write_text(text)
    assert "renewed" in home.renew()
    mine, theirs = (yaml.safe_load(data)["users"][0]["user"] for data in (home.old, home.new))
    for key, value in mine.items():
        text = text.replace(value, theirs[key])
    assert home.copy.read_text() == text
    assert "secret" in text
    assert theirs["client-key-data"] in text
    assert "up to date" in home.renew()


def test_c57_a_user_of_another_cluster_under_the_same_name_stays(home: Home) -> None:
    """As merging two clusters' admin.conf makes it: of two of one name the first counts."""
    foreign = yaml.safe_load(other_cluster(home))
    document = yaml.safe_load(home.old)
    document["users"] = [*foreign["users"], *document["users"]]
    home.copy.write_text(yaml.safe_dump(document, width=100_000))
    mixed = home.copy.read_bytes()
    assert "another cluster" in home.renew()
    assert home.copy.read_bytes() == mixed


def other_cluster(home: Home) -> bytes:
    """The same identity, signed by another CA of the same name."""
    made = {p: p.read_bytes() for p in home.pki.directory.rglob("*") if p.is_file()}
    try:
        key = home.pki.directory / "pki/front-proxy-ca.key"
        (home.pki.directory / "pki/ca.key").write_bytes(key.read_bytes())
        set_remaining(home.pki.directory, {"admin.conf": timedelta(days=200)})
        return home.admin.read_bytes()
    finally:
        for path, data in made.items():
            path.write_bytes(data)


def test_c57_a_link_stays_one_and_leads_to_the_new_one(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the host itself, whose root is no folder that links are followed in."""
    there = home.copy.with_name("kept-elsewhere")
    home.copy.rename(there)
    home.copy.symlink_to(there)
    monkeypatch.setattr("remediator.fixes.certificates.copies.ADMIN", str(home.admin))
    assert "renewed" in renew_copy(Root(), str(home.copy))
    assert home.copy.is_symlink()
    assert there.read_bytes() == home.new


def test_c57_an_older_file_of_that_name_is_not_written_over(home: Home) -> None:
    home.kept.write_text("somebody's")
    assert "in the backup" in home.renew()
    assert home.copy.read_bytes() == home.new
    assert home.kept.read_text() == "somebody's"

    home.copy.write_bytes(home.old)
    home.kept.write_bytes(home.old)  # of an earlier renewal
    assert f"the old one is {COPY}.old" in home.renew()
    set_remaining(home.pki.directory, {"admin.conf": timedelta(days=320)})
    assert f"the old one is {COPY}.old" in home.renew()
    assert home.kept.read_bytes() == home.new

    set_remaining(home.pki.directory, {"admin.conf": timedelta(days=340)})
    home.kept.unlink()
    home.kept.symlink_to("nowhere")
    assert "in the backup" in home.renew()
    assert home.kept.is_symlink()


def test_c57_a_path_that_only_a_shell_knows_is_an_error_of_the_configuration() -> None:
    Settings(kubeconfig_copies=(COPY,))
    with pytest.raises(ValueError, match=r"'~/.kube/config' is not an absolute path"):
        Settings(kubeconfig_copies=("~/.kube/config",))


def test_c57_a_pipe_is_not_waited_for(home: Home) -> None:
    home.copy.unlink()
    os.mkfifo(home.copy)
    assert home.renew() == f"{COPY} was left alone: it is no file"
