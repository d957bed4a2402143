"""The remediator's command line: flags, subcommands, and what they mean as one value."""

import argparse
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from exporter import config, logs
from exporter.flags import FlagParser, listen_address, node_name, path
from remediator.model import Phase

DEFAULT_JOURNAL = Path("/var/lib/upkeep/remediator.db")
DEFAULT_LOCKS = Path("/run/upkeep")

_OF_THE_CHECKOUT = frozenset({"UPKEEP_CACHE", "UPKEEP_SEED", "UPKEEP_SOAK"})


class Flags(msgspec.Struct, frozen=True, kw_only=True):
    """What every subcommand starts from."""

    listen: tuple[str, int]
    web_config_file: Path | None
    config_file: Path | None
    journal: Path
    dry_run: bool
    node_name: str
    cluster: str
    kubeconfig: Path | None
    rootfs: Path
    procfs: Path
    cgroupfs: Path
    lock_directory: Path
    log_level: str
    log_format: str


def parser(environ: Mapping[str, str] | None = None) -> FlagParser:
    """Every subcommand with its flags; each flag has an environment twin."""
    root = FlagParser(
        prog="upkeep-remediator",
        environ=environ,
        description="Receives Alertmanager's webhooks and removes the conditions that Upkeep's "
        "alerts name, after seeing them itself.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> FlagParser:
        added: FlagParser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", root=root
        )
        # By hand, the steps are shown as they go: of the log only what went wrong is of interest.
        _common(added, log_level="warning" if name in ("run", "restore") else "info")
        return added

    serve = command("serve", "accept webhooks and act on this host")
    _acting(serve)
    serve.flag(
        "web.listen-address",
        default=("", 9791),
        parse=listen_address,
        metavar="[HOST]:PORT",
        help="where to listen; an empty host means every address",
    )
    _web_config(serve)
    run = command("run", "run one fix by hand, now")
    _acting(run)
    run.add_argument("fix", metavar="FIX", help="rotate-certificates, reap-zombies, …")
    run.add_argument(
        "--force", action="store_true", help="rotate-certificates: renew whether due or not"
    )
    run.add_argument(
        "--scheduled",
        action="store_true",
        help="as a timer asks: cooldown, windows, approval and pauses stand, as for an alert",
    )
    for part in ("namespace", "pod", "container", "deployment"):
        run.add_argument(f"--{part}", default="", help=f"the target's {part}")
    _output(run)
    restore = command("restore", "put certificates of a backup back, or list the backups")
    _acting(restore)
    restore.add_argument(
        "backup", metavar="BACKUP", nargs="?", default="", help="its name or path; none: list them"
    )
    restore.add_argument(
        "--force", action="store_true", help="also one that has expired, or has another CA"
    )
    _output(restore)
    listing = command("list", "list remediations, newest first")
    listing.add_argument("--fix", default="", help="only those of this fix")
    listing.add_argument("--phase", choices=[p.value for p in Phase], help="only those in it")
    listing.add_argument("--target", default="", help="only those whose target holds this text")
    listing.add_argument("--limit", type=_positive, default=50, help="at most so many, default 50")
    _output(listing)
    show = command("show", "show one remediation with its steps")
    show.add_argument(
        "id", metavar="ID", type=_id, help="its id, or an unambiguous beginning of it"
    )
    _output(show)
    approve = command("approve", "let a waiting remediation act")
    approve.add_argument("id", metavar="ID", type=_id)
    pause = command("pause", "stop a fix, or every fix, from acting")
    pause.add_argument("fix", metavar="FIX", nargs="?", default="")
    pause.add_argument("--why", default="by hand", help="said with every refusal")
    resume = command("resume", "let a fix, or every fix, act again")
    resume.add_argument("fix", metavar="FIX", nargs="?", default="")
    check = command("check-config", "read the configuration and say what is wrong with it")
    _kubeconfig(check)
    _web_config(check)
    return root


def _common(parser: FlagParser, log_level: str) -> None:
    parser.flag("config.file", parse=path, metavar="FILE", help="guardrails: docs/remediator.md")
    parser.flag(
        "journal", default=DEFAULT_JOURNAL, parse=_file, metavar="FILE", help="the journal's file"
    )
    parser.flag(
        "log.level", default=log_level, choices=logs.LEVELS, help="least level that is logged"
    )
    parser.flag("log.format", default="logfmt", choices=logs.FORMATS, help="format of the log")


def _acting(parser: FlagParser) -> None:
    parser.switch("dry-run", default=False, help="check and decide, but change nothing")
    parser.flag(
        "node-name",
        parse=node_name,
        default=socket.gethostname().lower(),
        metavar="NAME",
        help="this node's name in the cluster",
    )
    parser.flag(
        "cluster",
        default="",
        metavar="NAME",
        help="alerts with another `cluster` label are not ours",
    )
    _kubeconfig(parser)
    for name, default, what in (
        ("rootfs", "/", "the root file system of the host"),
        ("procfs", "/proc", "the proc file system of the host"),
        ("cgroupfs", "/sys/fs/cgroup", "the cgroup file system of the host"),
        ("locks", str(DEFAULT_LOCKS), "the host's folder of lock files"),
    ):
        parser.flag(f"path.{name}", default=Path(default), parse=path, metavar="DIR", help=what)


def _kubeconfig(parser: FlagParser) -> None:
    parser.flag(
        "kubeconfig",
        parse=path,
        metavar="FILE",
        help="API access; default: the pod's own service account, else $KUBECONFIG",
    )


def _web_config(parser: FlagParser) -> None:
    parser.flag(
        "web.config.file",
        parse=path,
        metavar="FILE",
        help="exporter-toolkit web configuration (TLS, client CA, basic auth)",
    )


def _output(parser: FlagParser) -> None:
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="default: table"
    )


def _file(text: str) -> Path:
    if text == "kubernetes":
        raise argparse.ArgumentTypeError(
            "cluster mode is not built yet, so the journal is a file: name one, by default "
            f"{DEFAULT_JOURNAL}"
        )
    return path(text)


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:30]!r} is not a number above 0, of 9 digits")
    return int(text)


def _id(text: str) -> str:
    if not text:  # would be an unambiguous beginning of the only one there is
        raise argparse.ArgumentTypeError("it is empty; `list` shows the ids")
    return text


def read(
    arguments: Sequence[str] | None, environ: Mapping[str, str] | None = None
) -> tuple[argparse.Namespace, Flags]:
    """Parse; ends the process with status 2 and a sentence where that can't be done."""
    root = parser(environ)
    given = root.parse_args(arguments)
    _refuse_unknown_variables(root)
    for name in ("rootfs", "procfs"):
        seen: Path = getattr(given, f"path_{name}", Path("/"))
        if not seen.is_dir():  # everything in it would be missing, and nothing broken
            root.error(f"--path.{name}={seen} is not a directory; name the host's {name}")
    return given, Flags(
        listen=getattr(given, "web_listen_address", ("", 9791)),
        web_config_file=getattr(given, "web_config_file", None),
        config_file=given.config_file,
        journal=given.journal,
        dry_run=getattr(given, "dry_run", False),
        node_name=getattr(given, "node_name", ""),
        cluster=getattr(given, "cluster", ""),
        kubeconfig=getattr(given, "kubeconfig", None),
        rootfs=getattr(given, "path_rootfs", Path("/")),
        procfs=getattr(given, "path_procfs", Path("/proc")),
        cgroupfs=getattr(given, "path_cgroupfs", Path("/sys/fs/cgroup")),
        lock_directory=getattr(given, "path_locks", DEFAULT_LOCKS),
        log_level=given.log_level,
        log_format=given.log_format,
    )


def _refuse_unknown_variables(root: FlagParser) -> None:
    """A misspelt UPKEEP_DRY_RUN would act. The exporter's twins may stand in the same file."""
    known = root.variables | _OF_THE_CHECKOUT
    for sentence in root.misspelt_environment(known | config.parser({}).variables, alike=0):
        root.error(f"{sentence} Mend or unset it")
