"""Exporter, remediator, Prometheus and Alertmanager on this machine's loopback, as one thing.

`make run`, `make demo` and the end-to-end tests use the same stack, so that what a test sees is
what a person gets. Prometheus and Alertmanager are the real ones (see debian.py) with the rules and
the route of alerts/; the other two are this checkout's, in this virtual environment.

Everything it writes is in one folder, and no process outlives the one that started it.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from deploy.local import alerting
from deploy.local.alerting import SHIPPED, Addresses, Timing
from deploy.local.alertmanager import alertmanager_command
from deploy.local.cache import Progress, print_progress
from deploy.local.debian import binary
from deploy.local.processes import Program, port_for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a stack is to run; the defaults are this machine, as shipped, in dry run."""

    exporter: Sequence[str] = ()
    """More flags for the exporter."""
    remediator: Sequence[str] = ()
    """More flags for `upkeep-remediator serve`."""
    remediator_config: Mapping[str, Any] = field(default_factory=dict)
    """The remediator's configuration file, as the values it holds."""
    enforce: bool = False
    """False runs the remediator with --dry-run."""
    timing: Timing = SHIPPED
    ports: Mapping[str, int] = field(default_factory=dict)
    """Wanted port of exporter, remediator, prometheus, alertmanager; another where it's taken."""
    guarded: bool = True
    """Whether the remediator asks for a bearer token, which a browser can't send."""
    people: str = ""
    """URL of a webhook that stands for the people; empty: their alerts go nowhere."""
    inside: Sequence[str] = ()
    """A command that runs the rest of its arguments in the namespaces of a node; empty is here."""
    address: str = "127.0.0.1"
    """Where all four listen: an address of that node that is reached from here."""


class Stack:
    """A context manager; inside it the four programs run and are ready."""

    def __init__(
        self, directory: Path, settings: Settings | None = None, progress: Progress = print_progress
    ) -> None:
        """directory: made new; what an earlier run left in it is removed."""
        self.directory = directory
        self.settings = settings or Settings()
        self._progress = progress
        self.ports: dict[str, int] = {}
        self._running: dict[str, Program] = {}

    def __enter__(self) -> Self:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(mode=0o700, parents=True)
        for name in ("exporter", "remediator", "prometheus", "alertmanager"):
            self.ports[name] = port_for(self.settings.ports.get(name, 0))
        self._write()
        try:
            self.start("exporter")
            self.start("remediator")
            self.start("alertmanager")
            self.start("prometheus")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop what runs, the ones who cause work first."""
        for name in ("prometheus", "alertmanager", "remediator", "exporter"):
            self.stop(name)

    def url(self, name: str) -> str:
        """Where exporter, remediator, prometheus or alertmanager answers, without a last slash."""
        return f"http://{self.settings.address}:{self.ports[name]}"

    @property
    def journal(self) -> Path:
        """The remediator's journal file."""
        return self.directory / "journal.sqlite"

    @property
    def token(self) -> str:
        """What authorises requests to the remediator; empty where it isn't guarded."""
        if not self.settings.guarded:
            return ""
        return (self.directory / "webhook.token").read_text().strip()

    def program(self, name: str) -> Program:
        """The running program of that name."""
        return self._running[name]

    def dead(self) -> list[Program]:
        """Those that ended without being asked to."""
        return [program for program in self._running.values() if not program.running]

    def start(self, name: str) -> Program:
        """Start one of the four and wait until it is ready; also after `stop` or `kill`."""
        self._progress(f"starting {name} on {self.url(name)}")
        program = Program(
            name,
            [*self.settings.inside, *self._command(name)],
            self.directory / f"{name}.log",
            environment=_environment(),
        )
        self._running[name] = program
        token = self.token if name == "remediator" else ""
        program.wait_ready(f"{self.url(name)}/-/ready", token)
        return program

    def stop(self, name: str) -> None:
        """Stop one of the four, as a service manager would; nothing if it doesn't run."""
        if program := self._running.pop(name, None):
            program.stop()

    def kill(self, name: str) -> None:
        """kill -9 of one of the four."""
        self._running.pop(name).kill()

    def _command(self, name: str) -> list[str]:
        listen = f"{self.settings.address}:{self.ports[name]}"
        here = self.directory
        match name:
            case "exporter":
                flags = [f"--web.listen-address={listen}", *self.settings.exporter]
                return [sys.executable, "-m", "exporter", *flags]
            case "remediator":
                flags = [
                    f"--web.listen-address={listen}",
                    f"--config.file={here / 'remediator.yml'}",
                    f"--journal={self.journal}",
                    f"--path.locks={here / 'locks'}",
                    *([] if self.settings.enforce else ["--dry-run"]),
                    *self.settings.remediator,
                ]
                return [sys.executable, "-m", "remediator", "serve", *flags]
            case "prometheus":
                return [
                    str(binary("prometheus", progress=self._progress)),
                    f"--config.file={here / 'prometheus.yml'}",
                    f"--storage.tsdb.path={here / 'prometheus'}",
                    f"--web.listen-address={listen}",
                ]
            case "alertmanager":
                return [
                    *alertmanager_command(progress=self._progress),
                    f"--config.file={here / 'alertmanager.yml'}",
                    f"--storage.path={here / 'alertmanager'}",
                    f"--web.listen-address={listen}",
                    "--cluster.listen-address=",  # alone: no gossip
                ]
        raise ValueError(f"no program {name!r} in the stack")

    def _write(self) -> None:
        """The files that the four read."""
        here, timing = self.directory, self.settings.timing
        configuration = dict(self.settings.remediator_config)
        token_file = None
        if self.settings.guarded:
            token_file = here / "webhook.token"
            token_file.touch(mode=0o600)
            token_file.write_text(secrets.token_urlsafe(32) + "\n")
            configuration["webhook"] = {
                "bearer_token_file": str(token_file),
                **configuration.get("webhook", {}),
            }
        at = {name: f"{self.settings.address}:{port}" for name, port in self.ports.items()}
        addresses = Addresses(
            exporters=[at["exporter"]],
            remediators=[at["remediator"]],
            alertmanagers=[at["alertmanager"]],
        )
        alerting.write_rules(here, timing)
        (here / "prometheus.yml").write_text(
            alerting.prometheus_configuration(addresses, timing, token_file=token_file)
        )
        (here / "alertmanager.yml").write_text(
            alerting.alertmanager_configuration(
                f"{self.url('remediator')}/webhook",
                timing,
                token_file=token_file,
                people=self.settings.people,
            )
        )
        (here / "remediator.yml").write_text(yaml.safe_dump(configuration, sort_keys=False))


def _environment() -> dict[str, str]:
    """Ours, with the checkout importable; which kubeconfig to use is said by flags alone."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    ours = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    return {**ours, "PYTHONPATH": path}
