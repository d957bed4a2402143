"""What a scrape of the zombies costs, measured beside node_exporter and beside a plain C loop.

    python -m benchmarks.zombies [--processes 10000] [--pods 100] [--scrapes 20]

In one run, with the same processes, for both exporters the CPU of the whole process for each HTTP
scrape, best of several rounds. Needs root. It prints the ratios, and fails (exit code 1) where a
limit is missed:

* processes in the cgroups of pods: at most 1/20 of node_exporter's processes collector with no
  zombies, at most 1/10 with 200;
* the same processes outside any container: at most 1/3, and at most 1.2 times a C loop that reads
  every /proc/PID/stat;
* resident memory with certificates and zombies alone under 60 MB; idle CPU under 0.2 %.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from deploy.local.debian import binary
from exporter.checks.cgroups import CgroupTree
from tests.cluster.ports import reserved_ports
from tests.zombies.node import compile_workload

ROUNDS = 3
TICK = os.sysconf("SC_CLK_TCK")
# Rich comes with a tool of the developers alone, and structlog imports it where it is: 3 MB that an
# installed exporter hasn't.
AS_INSTALLED = """
import sys
sys.modules["rich"] = None
from exporter.__main__ import main
sys.exit(main())
"""
C_LOOP = r"""
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    char path[300], line[4096];
    long zombies = 0;
    for (int n = atoi(argv[1]); n > 0; n--) {
        DIR *proc = opendir("/proc");
        for (struct dirent *entry; (entry = readdir(proc));) {
            if (!isdigit(entry->d_name[0]))
                continue;
            snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
            int fd = open(path, O_RDONLY);
            if (fd < 0)
                continue;
            ssize_t got = read(fd, line, sizeof line - 1);
            close(fd);
            if (got <= 0)
                continue;
            line[got] = 0;
            char *name = strrchr(line, ')');
            zombies += name && name[2] == 'Z';
        }
        closedir(proc);
    }
    printf("%ld\n", zombies);
    return argc < 2;
}
"""


def say(text: str) -> None:
    print(text, flush=True)


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def resident(pid: int) -> float:
    """Megabytes of memory in use."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def get(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def cpu_per_scrape(process: "subprocess.Popen[bytes]", port: int, scrapes: int) -> float:
    """Milliseconds of the process's CPU for one scrape: the best round."""
    get(port)  # not the first: both learn something at it
    rounds = []
    for _ in range(ROUNDS):
        before = cpu_seconds(process.pid)
        for _ in range(scrapes):
            get(port)
        rounds.append((cpu_seconds(process.pid) - before) / scrapes * 1000)
    return min(rounds)


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A running exporter."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with suppress(OSError):
                get(port)
                break
            time.sleep(0.1)
        else:
            raise SystemExit(f"{command[0]} does not answer on port {port}")
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def processes(
    program: Path, count: int, groups: int, zombies: int, rootfs: Path, *, in_pods: bool
) -> Iterator[None]:
    """That many processes in so many groups, each below one parent; zombies are spread evenly."""
    cgroup = Path(CgroupTree().root) / f"upkeep-benchmark-{uuid.uuid4().hex[:8]}"
    links = rootfs / "var/log/containers"
    links.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(groups):
            uid, identity = uuid.uuid4(), uuid.uuid4().hex * 2
            folder = cgroup / f"kubepods/besteffort/pod{uid}/{identity}"
            dead = zombies // groups + (number < zombies % groups)
            live = count // groups - dead - 1
            join: Callable[[], object] | None = None
            if in_pods:
                folder.mkdir(parents=True)
                (links / f"pod-{number}_bench_main-{identity}.log").symlink_to("/nonexistent")
                join = _joining(folder)
            ready = rootfs / f"ready-{number}"
            ready.unlink(missing_ok=True)
            options = ["--parents", "0", "--first", "never", "--ready-file", str(ready)]
            command = [str(program), *options, "--zombies", str(dead), "--live", str(live)]
            started.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.DEVNULL,
                    preexec_fn=join,  # noqa: PLW1509 - no threads
                    start_new_session=True,
                )
            )
            while not ready.exists():
                time.sleep(0.01)
        yield
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(links)
        while cgroup.exists():  # the dead take a moment to be reaped by process 1
            for inner, _, _ in os.walk(cgroup, topdown=False):
                with suppress(OSError):
                    Path(inner).rmdir()
            time.sleep(0.1)


def _joining(folder: Path) -> Callable[[], object]:
    return lambda: (folder / "cgroup.procs").write_text("0")


def counted(port: int, wanted: int) -> None:
    """Fail unless the exporter counts exactly so many zombies in containers."""
    found = 0.0
    for _ in range(100):
        pattern = r'^upkeep_zombie_processes\{[^}]*namespace="bench"[^}]*\} (\S+)$'
        found = sum(float(value) for value in re.findall(pattern, get(port), re.MULTILINE))
        if found == wanted:
            return
        time.sleep(0.1)
    raise SystemExit(f"the exporter counts {found} zombies in containers, not {wanted}")


class Limits:
    """Prints each measurement against its limit and remembers whether one was missed."""

    missed = False

    def judge(self, what: str, value: float, limit: float, unit: str = "") -> None:
        good = value <= limit
        self.missed = self.missed or not good
        say(f"{'ok    ' if good else 'MISSED'} {what}: {value:.3g}{unit} (limit {limit:.3g}{unit})")


def main(arguments: Sequence[str]) -> int:
    """Run it; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=10_000)
    parser.add_argument("--pods", type=int, default=100)
    parser.add_argument("--zombies", type=int, default=200)
    parser.add_argument("--scrapes", type=int, default=20)
    given = parser.parse_args(arguments)
    if os.geteuid() != 0:
        raise SystemExit("it makes cgroups, so it needs root; run it with sudo")
    limits = Limits()
    # What it started ends with it, also when a time limit ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rootfs = folder / "root"
        program = compile_workload(folder)
        loop = folder / "loop"
        subprocess.run(["gcc", "-O2", "-xc", "-o", loop, "-"], input=C_LOOP.encode(), check=True)
        ours, theirs = stack.enter_context(reserved_ports(2))
        upkeep = [
            *(sys.executable, "-c", AS_INSTALLED, f"--web.listen-address=127.0.0.1:{ours}"),
            *("--no-collector.rollouts", "--zombies.min-age=0s", f"--path.rootfs={rootfs}"),
        ]
        node_exporter = [
            *(str(binary("prometheus-node-exporter")), f"--web.listen-address=127.0.0.1:{theirs}"),
            *("--collector.disable-defaults", "--collector.processes"),
        ]
        for zombies, in_pods, share in (
            (0, True, 1 / 20),
            (given.zombies, True, 1 / 10),
            (0, False, 1 / 3),
        ):
            where = f"in {given.pods} pods" if in_pods else "outside any container"
            say(f"{given.processes} processes {where}, {zombies} of them zombies")
            with (
                processes(program, given.processes, given.pods, zombies, rootfs, in_pods=in_pods),
                server(upkeep, ours) as we,
                server(node_exporter, theirs) as they,
            ):
                counted(ours, zombies)
                mine = cpu_per_scrape(we, ours, given.scrapes)
                other = cpu_per_scrape(they, theirs, given.scrapes)
                say(f"       upkeep {mine:.1f} ms, node_exporter {other:.1f} ms of CPU a scrape")
                limits.judge("share of node_exporter's", mine / other, share)
                if not in_pods:
                    plain = _c_loop(loop, given.scrapes)
                    say(f"       a C loop over /proc/PID/stat {plain:.1f} ms")
                    limits.judge("times a C loop", mine / plain, 1.2)
                counted(ours, zombies)
                limits.judge("resident memory", resident(we.pid), 60, " MB")
                before = cpu_seconds(we.pid)
                time.sleep(10)
                idle = (cpu_seconds(we.pid) - before) / 10
                limits.judge("idle CPU", idle * 100, 0.2, " %")
    return int(limits.missed)


def _c_loop(loop: Path, times: int) -> float:
    """Milliseconds of CPU for one pass over /proc: the best round."""
    rounds = []
    for _ in range(ROUNDS):
        before = os.times()
        subprocess.run([loop, str(times)], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        used = after.children_user + after.children_system
        used -= before.children_user + before.children_system
        rounds.append(used / times * 1000)
    return min(rounds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
