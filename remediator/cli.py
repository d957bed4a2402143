"""The commands for people: list, show, approve, pause, resume, run, restore, check-config.

They work on the journal's file itself, so they work whether the daemon runs or not.
"""

import argparse
import getpass
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from aiohttp import web

from exporter.kubernetes import AccessError, check_access
from exporter.logs import hush, inert
from exporter.web import Demands, Listener, WebConfigError
from remediator.config import ConfigError
from remediator.daemon import load_config, make_fixes
from remediator.fixes import FIXES, Entry
from remediator.flags import Flags
from remediator.hand import Forceable, Forced, Hands, LiveJournal, Restorable
from remediator.host import HostClock
from remediator.journal import ConflictError, JournalError
from remediator.journal.sqlite import SqliteJournal
from remediator.model import Phase, Remediation, Target, TargetError, target_from_labels

RESTORES = "rotate-certificates"
"""The fix whose backups `restore` puts back."""


_UNKNOWN = ("Locked", "CheckFailed", "Interrupted")
"""Refusals that leave open whether anything needs doing: no success for a script."""


class CommandError(Exception):
    """The command can't be done; the sentence says why and what to do."""


async def command(
    given: argparse.Namespace, flags: Flags, fixes: Mapping[str, Entry] = FIXES
) -> int:
    """Run one command; the exit status. Errors are one sentence on standard error."""
    try:
        match given.command:
            case "check-config":
                return _check_config(flags, fixes)
            case "run":
                return await _run(given, flags, fixes)
            case "restore":
                return await _restore(given, flags, fixes)
            case _:
                return await _with_journal(given, flags, fixes)
    except (CommandError, ConfigError, ConflictError, JournalError, TargetError) as error:
        problem = str(error)
    except PermissionError as error:
        problem = f"this user may not use {error.filename or 'that'}; try it as root"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        problem = f"{where}{error.strerror or error}"
    sys.stderr.write(f"upkeep-remediator: {inert(problem)}\n")
    return 1


def _say(text: str) -> None:
    """Print a line. Where nobody reads on (`| head`), the command goes on all the same."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        hush(sys.stdout)


def _check_config(flags: Flags, fixes: Mapping[str, Entry]) -> int:
    if flags.config_file is None:
        raise CommandError("no file to check; name it by --config.file")
    loaded, settings = load_config(flags, fixes)
    make_fixes(flags, settings, fixes)
    token = loaded.webhook.bearer_token_file
    demands = Demands(bearer_token_file=Path(token) if token else None)
    try:
        Listener(web.Application(), flags.listen, flags.web_config_file, demands=demands).load()
        check_access(flags.kubeconfig, os.environ)
    except (AccessError, WebConfigError) as error:
        raise CommandError(str(error)) from None
    modes = ", ".join(f"{name}: {policy.mode}" for name, policy in loaded.fixes.items())
    _say(f"{flags.config_file}: good ({modes})")
    return 0


async def _with_journal(given: argparse.Namespace, flags: Flags, fixes: Mapping[str, Entry]) -> int:
    if not flags.journal.exists():
        raise CommandError(f"there is no journal at {flags.journal} yet; name it by --journal")
    reads = given.command in ("list", "show")
    journal = SqliteJournal(flags.journal, HostClock(), read_only=reads)
    try:
        match given.command:
            case "list":
                return await _list(given, journal, fixes)
            case "show":
                return await _show(given, journal)
            case "approve":
                found = await _get(journal, given.id)
                done = await journal.approve(found.id, _person())
                said = "it's looked at now, and acts if nothing else is against it"
                _say(f"{done.id}: approved; {said}")
                return 0
            case _:
                return await _pause_or_resume(given, journal, fixes)
    finally:
        await journal.aclose()


async def _list(
    given: argparse.Namespace, journal: SqliteJournal, fixes: Mapping[str, Entry]
) -> int:
    _refuse_unknown(given.fix, fixes)
    found = await journal.find(
        fix=given.fix,
        phase=Phase(given.phase) if given.phase else None,
        target=given.target,
        limit=given.limit,
    )
    if given.output == "json":
        _print_json(found)
        return 0
    rows = [
        (
            r.id,
            _time(r.last_seen_at if r.count > 1 else r.created_at),
            r.fix,
            str(r.target),
            r.phase.value,
            r.reason + (f" x{r.count}" if r.count > 1 else ""),
            r.message,
        )
        for r in found
    ]
    _print_table(("ID", "TIME (UTC)", "FIX", "TARGET", "PHASE", "REASON", "MESSAGE"), rows)
    for pause in await journal.pauses():
        text = f"{pause.fix} is paused since {_time(pause.since)} by {pause.by}: {pause.why}"
        _say(inert(text))
    return 0


async def _show(given: argparse.Namespace, journal: SqliteJournal) -> int:
    found = await _get(journal, given.id)
    if given.output == "json":
        _print_json(found)
    else:
        _print_whole(found)
    return 0


async def _get(journal: SqliteJournal, remediation_id: str) -> Remediation:
    found = await journal.get(remediation_id)
    if found is None:
        raise CommandError(f"no remediation, or more than one, begins with {remediation_id!r}")
    return found


async def _pause_or_resume(
    given: argparse.Namespace, journal: SqliteJournal, fixes: Mapping[str, Entry]
) -> int:
    _refuse_unknown(given.fix, fixes)
    said = []
    for name in [given.fix] if given.fix else sorted(fixes):
        if given.command == "pause":
            done = await journal.pause(name, _person(), given.why)
            said.append(f"{name}: {'paused' if done else 'was paused already'}")
        else:
            done = await journal.resume(name, _person())
            said.append(f"{name}: {'acts again' if done else 'was not paused'}")
    _say("\n".join(said))  # not before all is done: that can't be printed stops none of it
    return 0


def _refuse_unknown(fix: str, fixes: Mapping[str, Entry]) -> None:
    if fix and fix not in fixes:
        raise CommandError(f"no such fix: {fix}; known: {', '.join(sorted(fixes))}")


async def _run(given: argparse.Namespace, flags: Flags, fixes: Mapping[str, Entry]) -> int:
    _refuse_unknown(given.fix, fixes)
    loaded, settings = load_config(flags, fixes, only=given.fix)
    fix = make_fixes(flags, settings, {given.fix: fixes[given.fix]})[given.fix]
    looking = fix
    if given.force:
        if not isinstance(fix, Forceable):
            raise CommandError(f"{given.fix} acts on what is broken only; leave --force out")
        if given.scheduled:
            raise CommandError("--force is a person's word, --scheduled a timer's; leave one out")
        looking = Forced(fix)
    parts = {name: getattr(given, name) for name in ("namespace", "pod", "container", "deployment")}
    labels = {"node": flags.node_name, **parts}
    if missing := [name for name in fix.target_labels if not labels[name]]:
        flags_wanted = " ".join(f"--{name}" for name in missing)
        raise CommandError(f"{given.fix} needs {flags_wanted}")
    target = target_from_labels(labels, fix.target_labels)
    journal = _live_journal(given, flags)
    try:
        hands = Hands(flags, loaded, fix, journal)
        await _finish_left(given, hands, target)
        if given.scheduled:
            found = await hands.ask(target)
        else:
            found = await hands.run(target, _person(), looking)
    finally:
        await journal.aclose()
    _print_end(given, found)
    return 1 if found and (found.phase is Phase.FAILED or found.reason in _UNKNOWN) else 0


async def _restore(given: argparse.Namespace, flags: Flags, fixes: Mapping[str, Entry]) -> int:
    loaded, settings = load_config(flags, fixes, only=RESTORES)
    fix = make_fixes(flags, settings, {RESTORES: fixes[RESTORES]})[RESTORES]
    if not isinstance(fix, Restorable):
        raise CommandError(f"{RESTORES} keeps no backups")
    if not given.backup:
        return _list_backups(given, fix)
    target = target_from_labels({"node": flags.node_name}, fix.target_labels)
    journal = _live_journal(given, flags)
    try:
        hands = Hands(flags, loaded, fix, journal)
        await _finish_left(given, hands, target)
        found = await hands.run(target, _person(), fix.restoring(given.backup, forced=given.force))
    finally:
        await journal.aclose()
    _print_end(given, found)
    return 0 if found.phase is Phase.SUCCEEDED or found.reason == "DryRun" else 1


def _list_backups(given: argparse.Namespace, fix: Restorable) -> int:
    found = fix.backups()
    if given.output == "json":
        _print_json(found)
        return 0
    if not found:
        _say("there are no backups yet")
        return 0
    rows = [(b.name, _time(b.created), f"{b.size / 1e3:.0f} kB", b.node, b.holds) for b in found]
    _print_table(("BACKUP", "MADE (UTC)", "SIZE", "NODE", "HOLDS"), rows)
    return 0


def _live_journal(given: argparse.Namespace, flags: Flags) -> LiveJournal:
    """Steps go where people look; JSON stays alone on standard output."""
    out = sys.stderr if given.output == "json" else sys.stdout

    def say(line: str) -> None:
        print(inert(line), file=out, flush=True)

    return LiveJournal(flags.journal, HostClock(), say)


async def _finish_left(given: argparse.Namespace, hands: Hands, target: Target) -> None:
    for left in await hands.finish_left(target):
        if given.output != "json":
            _say(inert(f"finished first, left by a process that died: {_outcome(left)}"))


def _print_end(given: argparse.Namespace, found: Remediation | None) -> None:
    with suppress(OSError):  # the terminal may be gone; the journal has it
        if given.output == "json":
            _print_json(found)
        elif found is not None:
            _say(inert(_outcome(found)))


def _outcome(found: Remediation) -> str:
    return f"{found.phase.value} ({found.reason}), {found.id}: {found.message}"


def _person() -> str:
    """Who sits at the keyboard, through sudo too."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return f"uid {os.getuid()}"


def _time(moment: datetime | None) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if moment else ""


def _print_json(value: object) -> None:
    _say(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; what names hold can't reach the terminal's controls."""
    lines = [head, *([inert(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        _say("  ".join((*cells, line[-1])).rstrip())


def _print_whole(found: Remediation) -> None:
    facts = (
        ("id", found.id),
        ("fix", found.fix),
        ("target", str(found.target)),
        ("phase", found.phase.value),
        ("reason", found.reason),
        ("message", found.message),
        ("asked for by", found.origin.value),
        ("created", _time(found.created_at)),
        ("started", _time(found.started_at)),
        ("ended", _time(found.ended_at)),
        ("approved by", found.approved_by),
        ("expires", "" if found.phase.terminal else _time(found.expires_at)),
        ("times", str(found.count) if found.count > 1 else ""),
    )
    for name, value in facts:
        if value:
            _say(f"{name + ':':14}{inert(value)}")
    for alert in found.alerts:
        state = "resolved" if alert.resolved else "firing"
        _say(f"{'alert:':14}{inert(alert.name)} since {_time(alert.starts_at)}, {state}")
    if found.steps:
        _say("")
        rows = [
            (
                _time(step.started_at),
                {True: "ok", False: "failed", None: "under way"}[step.ok],
                "" if step.seconds is None else f"{step.seconds:.1f} s",
                step.name,
                f"{step.message} {step.result}".strip(),
            )
            for step in found.steps
        ]
        _print_table(("TIME (UTC)", "OUTCOME", "TOOK", "STEP", "WHAT"), rows)
