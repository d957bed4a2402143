"""What `make run` is made of: rendered files, bound programs, sentences about a machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deploy.local.alerting import (
    ALERTS,
    QUICK,
    SHIPPED,
    Addresses,
    Timing,
    prometheus_configuration,
    seconds,
    write_rules,
)
from deploy.local.debian import binary
from deploy.local.findings import sentences
from deploy.local.processes import Program, StartError, port_for
from deploy.local.run import find_kubeconfig, settings
from tests.exporter.test_main import CONFIG

ADDRESSES = Addresses(
    exporters=["127.0.0.1:1"], remediators=["127.0.0.1:2"], alertmanagers=["127.0.0.1:3"]
)


@pytest.mark.debian
@pytest.mark.parametrize("timing", [SHIPPED, QUICK], ids=["shipped", "quick"])
def test_prometheus_takes_the_rendered_files(timing: Timing, tmp_path: Path) -> None:
    write_rules(tmp_path, timing)
    (tmp_path / "prometheus.yml").write_text(prometheus_configuration(ADDRESSES, timing))
    promtool = [str(binary("promtool")), "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(promtool, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_waits_of_rules_are_shortened(tmp_path: Path) -> None:
    write_rules(tmp_path, Timing(rule_for=90))
    for source in ALERTS.glob("*.rules.yaml"):
        shipped = yaml.safe_load(source.read_text())
        rendered = yaml.safe_load((tmp_path / source.name).read_text())
        for before, after in zip(shipped["groups"], rendered["groups"], strict=True):
            for old, new in zip(before["rules"], after["rules"], strict=True):
                assert ("for" in old) == ("for" in new)
                if "for" in old:
                    assert seconds(new.pop("for")) == min(90, seconds(old.pop("for")))
                assert old == new


def test_what_differs_from_the_shipped_waits_is_said() -> None:
    assert SHIPPED.sentence() == ""
    assert "`for:` at most 3 s" in QUICK.sentence()


def test_programs_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Even by kill -9, and with their parent's session untouched."""
    code = (
        "import sys, time; from pathlib import Path; from deploy.local.processes import Program\n"
        f"p = Program('sleeper', ['sleep', '600'], Path({str(tmp_path / 'log')!r}))\n"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while b"sleep" not in (status := command_line(child)):
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while command_line(child):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


def command_line(pid: int) -> bytes:
    """What a process was started with; empty once it is gone, a zombie included."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_program_that_ends_at_once_is_named_with_its_last_words(tmp_path: Path) -> None:
    program = Program("talker", ["sh", "-c", "echo the disk is full; exit 3"], tmp_path / "log")
    with pytest.raises(StartError, match=r"talker ended with status 3(.|\n)*the disk is full"):
        program.wait_ready(f"http://127.0.0.1:{port_for(0)}/", within=20)


def test_a_program_that_ignores_the_polite_signal_is_ended_all_the_same(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True)\n"
    program = Program("deaf", [sys.executable, "-c", code + "time.sleep(600)"], tmp_path / "log")
    deadline = time.monotonic() + 20
    while "deaf" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    program.stop(within=0.5)
    assert not program.running


def test_a_taken_port_gives_another() -> None:

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_for(port) != port
    assert port_for(port) == port


def test_dry_run_unless_told_to_enforce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings({}).enforce is False
    assert settings({"ENFORCE": "0"}).enforce is False
    assert settings({"ENFORCE": "1"}).enforce is True


def test_rollouts_are_on_where_a_kubeconfig_can_be_used(tmp_path: Path) -> None:
    kubeconfig, empty = tmp_path / "config", tmp_path / "empty"
    kubeconfig.write_text(CONFIG)
    empty.touch()
    environ = {"KUBECONFIG": os.pathsep.join(map(str, (tmp_path / "nowhere", empty, kubeconfig)))}
    assert find_kubeconfig(environ) == kubeconfig
    assert settings(environ).exporter == [f"--kubeconfig={kubeconfig}"]


CALM = """\
upkeep_scrape_collector_success{collector="certificates"} 1
upkeep_scrape_collector_success{collector="zombies"} 1
upkeep_scrape_collector_success{collector="rollouts"} 1
upkeep_zombie_processes{node="n",namespace="",pod="",container=""} 0
upkeep_pids_used{node="n",namespace="",pod=""} 200
upkeep_pids_limit{node="n",namespace="",pod=""} 32000
"""


def test_a_calm_machine_in_sentences() -> None:
    assert list(sentences(CALM)) == [
        "certificates: none where kubeadm, Kubespray, k3s and the kubelet keep theirs",
        "zombies: none so far (one counts once it has been seen as one for 30 s)",
        "zombies: 200 of 32000 process slots taken (0.6%)",
        "rollouts: none is stuck",
    ]
    assert "rollouts: off, no kubeconfig" in sentences(CALM, rollouts_off="off, no kubeconfig")


def test_a_troubled_machine_in_sentences() -> None:
    certificate = 'node="n",serial="1",subject="s",issuer="i",usage="server",managed_by="kubeadm"'
    page = f"""\
upkeep_scrape_collector_success{{collector="certificates"}} 1
upkeep_scrape_collector_success{{collector="zombies"}} 0
upkeep_certificate_expiry_days{{{certificate},path="/p/a.crt",name="a"}} 200
upkeep_certificate_expiry_days{{{certificate},path="/p/b.crt",name="b"}} -1.5
upkeep_certificate_read_errors{{node="n",path="/p/c.crt",reason="empty"}} 1
upkeep_certificate_stale{{node="n",name="b",component="etcd"}} 1
upkeep_certificate_stale{{node="n",name="a",component="kube-apiserver"}} 0
upkeep_zombie_processes{{node="n",namespace="shop",pod="web",container="app"}} 70
upkeep_zombie_processes{{node="n",namespace="",pod="",container=""}} 2
upkeep_rollout_stuck_seconds{{namespace="shop",deployment="d",reason="Other"}} 90
upkeep_rollout_stuck_seconds{{namespace="shop",deployment="e",reason="QuotaExceeded"}} 30
upkeep_rollout_unstickable{{namespace="shop",deployment="e"}} 1
"""
    assert list(sentences(page)) == [
        (
            "certificates: 2 found, 2 of them kubeadm's; b (/p/b.crt) ended 1.5 days ago, "
            "before all others"
        ),
        "certificates: /p/c.crt can't be read: empty",
        "certificates: etcd still uses an older b than the one on disk",
        "zombies: 70 in shop/web app",
        "zombies: 2 of the host's own, which Upkeep counts and leaves alone",
        "rollouts: shop/d stuck for 90 s (Other); freeing its old pods might or might not help",
        "rollouts: shop/e stuck for 30 s (QuotaExceeded); freeing its old pods would help",
        "zombies: can't be seen now; see the exporter's log",
    ]


def test_ctrl_c_is_enough_once() -> None:
    """A second one while stopping must not cut the stopping short."""
    code = (
        "import signal, time; from deploy.local import run\n"
        "signal.signal(signal.SIGINT, run._interrupt)\n"
        "try:\n print('up', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n print('stopping', flush=True); time.sleep(1); print('done')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "done\n"
