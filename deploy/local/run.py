"""`make run`: Upkeep for this very machine, with a Prometheus and an Alertmanager of its own.

It shows what Upkeep sees and what it would do; with ENFORCE=1 it does it. Everything listens on
loopback, is kept under .run/ and ends with Ctrl-C.
"""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from deploy.local.debian import DebianError
from deploy.local.events import Events
from deploy.local.findings import sentences
from deploy.local.observe import UnreachableError, get_text
from deploy.local.processes import StartError
from deploy.local.stack import Settings, Stack
from exporter.kubernetes import AccessError, check_access

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".run"
PORTS = {"exporter": 9790, "remediator": 9791, "prometheus": 9090, "alertmanager": 9093}


def main(state: Path = STATE) -> int:
    """Run until Ctrl-C, with everything below the folder `state`; the exit status.

    0 after Ctrl-C, 1 where something did not start or died.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    folder = state / "run"
    try:
        with _alone(state), Stack(folder, settings(os.environ), progress=_progress) as stack:
            return _watch(stack)
    except KeyboardInterrupt:
        say(f"stopped; what it wrote is in {folder}")
        return 0
    except (StartError, DebianError) as error:
        print(f"upkeep: {error}", file=sys.stderr)
        return 1


def settings(environ: Mapping[str, str]) -> Settings:
    """What to run here, by what this user may read and what ENFORCE says."""
    kubeconfig = find_kubeconfig(environ)
    enforce = environ.get("ENFORCE") == "1"
    exporter = [f"--kubeconfig={kubeconfig}"] if kubeconfig else ["--no-collector.rollouts"]
    remediator = [f"--kubeconfig={kubeconfig}"] if kubeconfig else []
    if enforce:
        remediator.append("--path.locks=/run/upkeep")  # shared with daemons of this machine
    return Settings(
        exporter=exporter,
        remediator=remediator,
        enforce=enforce,
        guarded=False,  # a person looks at its page in a browser, and it listens on loopback
        ports=PORTS,
    )


def find_kubeconfig(environ: Mapping[str, str]) -> Path | None:
    """$KUBECONFIG, ~/.kube/config or kubeadm's admin.conf: the first that can be used."""
    candidates = [Path(p) for p in environ.get("KUBECONFIG", "").split(os.pathsep) if p]
    candidates += [Path.home() / ".kube/config", Path("/etc/kubernetes/admin.conf")]
    return next((path for path in candidates if _can_be_used(path)), None)


def _can_be_used(kubeconfig: Path) -> bool:
    try:
        check_access(kubeconfig, {})
    except AccessError:
        return False
    return True


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def _watch(stack: Stack) -> int:
    say("")
    for name in ("exporter", "remediator", "prometheus", "alertmanager"):
        say(f"  {name:<13} {stack.url(name)}")
    say("")
    _say_mode(stack.settings.enforce)
    off = ""
    if "--no-collector.rollouts" in stack.settings.exporter:
        off = "off, as there is no kubeconfig (KUBECONFIG, ~/.kube/config, kubeadm's admin.conf)"
    for sentence in sentences(get_text(f"{stack.url('exporter')}/metrics"), rollouts_off=off):
        say(f"  {sentence}")
    say("\nwatching; one line for each event, Ctrl-C ends it")
    events = Events(stack.url("prometheus"), stack.url("remediator"), stack.token)
    while not (dead := stack.dead()):
        try:
            for event in events.new():
                say(f"{datetime.now(UTC):%H:%M:%S}  {event.kind:<10} {event.text}")
        except UnreachableError as error:
            say(f"{datetime.now(UTC):%H:%M:%S}  {error}")
        time.sleep(1)
    for program in dead:
        print(f"upkeep: {program.last_words('ended by itself')}", file=sys.stderr)
    return 1


def _say_mode(enforce: bool) -> None:
    if enforce:
        say("ENFORCE=1: what can be healed IS healed on this machine.")
    else:
        say("Dry run: nothing on this machine is changed; ENFORCE=1 make run acts.")
    if os.geteuid() != 0:
        say("Not root: certificates and processes that this user can't read are left out, and")
        say("nothing could be healed. `sudo make run` sees everything.")
    say("")


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Two at once would write into one folder."""
    state.mkdir(mode=0o700, exist_ok=True)
    with (state / "run.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError("`make run` runs already in this checkout; end it first") from None
        yield


def _progress(text: str) -> None:
    print(f"upkeep: {text}", file=sys.stderr, flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # one is enough: stopping has begun
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
