"""`upkeep-remediator serve`: puts the parts together, and takes them down in order."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from exporter.kubernetes import AccessError, check_access, has_access
from exporter.logs import get_logger
from exporter.web import Demands, Listener, WebConfigError, loopback
from remediator import config
from remediator.alertmanager import Reader
from remediator.config import Config, ConfigError, Mode
from remediator.fixes import FIXES, Edges, Entry, settings_types
from remediator.flags import Flags
from remediator.host import HostClock, LockedError, host_lock, own_claim
from remediator.journal import JournalError
from remediator.journal.sqlite import SqliteJournal
from remediator.metrics import Metrics
from remediator.model import Fix, Phase
from remediator.scheduler import Scheduler
from remediator.server import Api
from remediator.worker import Worker

log = get_logger("remediator")

# Seconds. The journal's thread gives up Python's lock at every statement and would wait Python's
# default of 5 ms for it, each time, while the event loop is busy.
_SWITCH = 0.0005

# New objects until Python looks for cyclic garbage, of which a request leaves none.
_GARBAGE = 20_000


_OPEN = (
    "whoever reaches this port could ask for fixes: give it credentials or client certificates "
    "(--web.config.file, webhook.bearer_token_file), listen on 127.0.0.1, or set "
    "webhook.allow_unauthenticated: true"
)


def load_config(
    flags: Flags, fixes: Mapping[str, Entry], only: str = ""
) -> tuple[Config, dict[str, Any]]:
    """The configuration, with `unstick-rollout` off by default where no API server is known.

    only: the one fix that is wanted; that another can't do what it's told is no matter then.
    """
    lacking: set[str] = set()
    if not has_access(flags.kubeconfig, os.environ):
        lacking = {name for name, entry in fixes.items() if not entry.on_node}
    if only:
        lacking &= {only}
    return config.load(flags.config_file, settings_types(fixes), lacking)


def make_fixes(
    flags: Flags, settings: Mapping[str, Any], fixes: Mapping[str, Entry]
) -> dict[str, Fix]:
    """Each fix of its settings; `ConfigError` where they don't go together."""
    edges = Edges(
        node_name=flags.node_name,
        rootfs=flags.rootfs,
        procfs=flags.procfs,
        cgroupfs=flags.cgroupfs,
        kubeconfig=flags.kubeconfig,
    )
    made = {}
    for name, entry in fixes.items():
        try:
            made[name] = entry.make(settings[name], edges)
        except ValueError as error:
            raise ConfigError(f"{flags.config_file}: fixes.{name}.settings: {error}") from None
    return made


class Daemon:
    """One host's remediator."""

    def __init__(self, flags: Flags, fixes: Mapping[str, Entry] = FIXES) -> None:
        """`ConfigError` where the configuration can't be used."""
        self._flags = flags
        self._entries = fixes
        self._config, self._settings = load_config(flags, fixes)
        self._fixes = make_fixes(flags, self._settings, fixes)
        self._metrics = Metrics(self._fixes)
        clock = HostClock()
        bounds = self._config.journal
        self._journal = SqliteJournal(
            flags.journal, clock, max_bytes=bounds.max_bytes, max_active=bounds.max_active
        )
        self._worker = Worker(
            journal=self._journal,
            fixes=self._fixes,
            config=lambda: self._config,
            clock=clock,
            claim=own_claim(clock),
            lock_directory=flags.lock_directory,
            events=self._metrics,
            dry_run=flags.dry_run,
        )
        self._scheduler = Scheduler(self._journal, self._worker, lambda: self._config)
        self._reloading = asyncio.Lock()
        self._reader = self._make_reader()
        self._api = Api(
            journal=self._journal,
            metrics=self._metrics,
            reader=lambda: self._reader,
            config=lambda: self._config,
            accepted=self._scheduler.wake,
            reload=self.reload,
            title=flags.node_name,
            dry_run=flags.dry_run,
        )
        app = self._api.application()
        self.listener = Listener(
            app,
            flags.listen,
            flags.web_config_file,
            demands=self._demands(self._config),
            hot={("POST", "/webhook"): self._api.webhook},
            answered=self._api.answered,
        )

    def _demands(self, config: Config) -> Demands:
        options = config.webhook
        bearer = options.bearer_token_file
        may_be_open = options.allow_unauthenticated or loopback(self._flags.listen[0])
        return Demands(
            bearer_token_file=Path(bearer) if bearer else None,
            max_connections=options.max_connections,
            never_open="" if may_be_open else _OPEN,
        )

    def _make_reader(self) -> Reader:
        return Reader(
            target_labels={name: fix.target_labels for name, fix in self._fixes.items()},
            enabled=lambda name: self._config.fixes[name].mode is not Mode.OFF,
            node=self._flags.node_name,
            cluster=self._flags.cluster,
            matchers=self._config.matchers,
        )

    async def reload(self) -> str:
        """Take over the configuration file, whole or not at all; what is wrong with it, or ''."""
        async with self._reloading:  # two at once could leave what neither of them read
            try:
                await self._reload()
            except (ConfigError, WebConfigError) as error:
                problem = str(error)
            except Exception:
                log.exception("the reload failed unexpectedly")
                problem = "an unexpected error; the log has the traceback"
            else:
                self._metrics.reload_successful.set(1)
                log.info("configuration reloaded")
                await self._worker.reconfigured()
                self._scheduler.wake()
                return ""
            self._metrics.reload_successful.set(0)
            log.error("the old configuration stays in force", why=problem)
            return problem

    async def _reload(self) -> None:
        loaded, settings = load_config(self._flags, self._entries)
        # A fix whose settings are the same stays: it may hold threads, or a memory of its own.
        changed = {
            name: entry
            for name, entry in self._entries.items()
            if settings[name] != self._settings[name]
        }
        fixes = {**self._fixes, **make_fixes(self._flags, settings, changed)}
        await self.listener.reload(self._demands(loaded))
        self._config, self._settings = loaded, settings
        self._worker.fixes = self._fixes = fixes
        bounds = loaded.journal
        self._journal.bound(max_bytes=bounds.max_bytes, max_active=bounds.max_active)
        self._reader = self._make_reader()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit status.

        Two daemons on one journal would each count their own slots and storms.
        """
        journal = str(self._flags.journal.absolute())
        name = f"serve-{sha256(journal.encode()).hexdigest()[:8]}"
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(host_lock(self._flags.lock_directory, name))
            except LockedError as error:
                log.error("another daemon works on this journal", journal=journal, why=str(error))
                return 1
            except OSError as error:  # it can't act without lock files either, and will say so
                log.warning("no lock file for the journal", journal=journal, why=error.strerror)
            return await self._run()

    async def _run(self) -> int:
        sys.setswitchinterval(_SWITCH)
        gc.collect()
        gc.set_threshold(_GARBAGE)
        gc.freeze()  # modules never become garbage: looking through them again costs 50 ms a time
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stopping() -> None:
            if stop.is_set():
                log.warning("told so again: it ends now; the next start resumes what is under way")
                _end_now()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping)
        reloads: set[asyncio.Task[str]] = set()

        def reload() -> None:
            task = asyncio.create_task(self.reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, reload)
        host, port = self._flags.listen
        await self._refuse_bad_access()
        try:
            self.listener.load()
            await self.listener.start()
        except (WebConfigError, OSError) as error:
            why = str(error) if isinstance(error, WebConfigError) else error.strerror
            log.error("can't listen; see --web.listen-address", address=f"{host}:{port}", why=why)
            return 1
        acting = {n: p.mode.value for n, p in self._config.fixes.items()}
        log.info(
            "listening",
            address=f"{self.listener.scheme}://{host or '*'}:{self.listener.port}",
            node=self._flags.node_name,
            dry_run=self._flags.dry_run,
            **{name.replace("-", "_"): mode for name, mode in acting.items()},
        )
        scheduling = asyncio.create_task(self._scheduler.run())
        self._api.ready = True
        await stop.wait()
        log.info("stopping")
        self._api.ready = False
        await self.listener.aclose()
        left = await self._scheduler.stop(self._config.shutdown_grace)
        await scheduling
        await self._journal.aclose()
        if left:
            log.warning("ends with remediations under way; the next start resumes them", count=left)
            _end_now()
        return 0

    async def _refuse_bad_access(self) -> None:
        """`ConfigError` where the kubeconfig can't be read, unless there is work to be finished:
        a rotation that was killed half-way may have left that very file broken.
        """
        try:
            check_access(self._flags.kubeconfig, os.environ)
        except AccessError as error:
            with contextlib.suppress(JournalError):
                if await self._journal.find(phase=Phase.RUNNING, limit=1):
                    log.error(
                        "starts all the same: what was begun has to be finished", why=str(error)
                    )
                    return
            await self._journal.aclose()
            raise ConfigError(str(error)) from None


def _end_now() -> NoReturn:
    """Past every handler, like SIGKILL: cancelling what runs would make it undo in haste."""
    logging.shutdown()
    os._exit(0)
