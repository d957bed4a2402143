"""Command-line flags in Prometheus style, each with an `UPKEEP_…` environment twin.

argparse does the work; this adds what it lacks: dotted names, the environment as default, switches
that can be turned off, and errors of one sentence that name the flag or variable at fault.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_LONGEST = 36_500 * 86_400.0  # of a duration; dates and clocks end somewhere
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})

# Kubernetes puts these into every pod beside a Service whose name begins with `upkeep`.
_OF_A_SERVICE = re.compile(
    r"UPKEEP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)


def environment_name(flag: str) -> str:
    """The environment twin of a flag: `web.listen-address` is `UPKEEP_WEB_LISTEN_ADDRESS`."""
    return "UPKEEP_" + flag.replace(".", "_").replace("-", "_").upper()


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose flags read the environment before their default.

    Bad values end the process with status 2 and one sentence, whether they came from the command
    line or from the environment.
    """

    def __init__(
        self,
        *args: Any,
        environ: Mapping[str, str] | None = None,
        root: "FlagParser | None" = None,
        **kwargs: Any,
    ) -> None:
        """root: the parser whose subcommand this one is; they share the environment."""
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self._environ = os.environ if environ is None else environ
        self._variables: set[str] = set()
        if root is not None:
            self._environ, self._variables = root._environ, root._variables  # noqa: SLF001

    @property
    def variables(self) -> frozenset[str]:
        """The environment twins of all flags so far, those of subcommands too."""
        return frozenset(self._variables)

    def flag(
        self,
        name: str,
        *,
        help: str,  # noqa: A002 - argparse's own name
        default: Any = None,
        parse: Callable[[str], Any] = str,
        choices: Sequence[str] | None = None,
        repeat: bool = False,
        metavar: str | None = None,
    ) -> None:
        """Add `--name VALUE`. With `repeat` the value is a tuple (environment: comma-separated)."""
        variable = environment_name(name)
        self._variables.add(variable)
        text = self._environ.get(variable)
        if text:  # an empty variable is an unset one: manifests often carry `VALUE=`
            default = self._from_environment(variable, text, parse, choices, repeat=repeat)
        self.add_argument(
            f"--{name}",
            dest=destination(name),
            type=parse,
            choices=choices,
            metavar=metavar or (None if choices else "VALUE"),
            action=_Repeat if repeat else "store",
            default=default,
            help=_help(help, variable, default),
        )

    def switch(self, name: str, *, help: str, default: bool) -> None:  # noqa: A002
        """Add `--name` and `--no-name` (environment: true or false)."""
        variable = environment_name(name)
        self._variables.add(variable)
        text = self._environ.get(variable)
        if text:
            if text.lower() not in _TRUE | _FALSE:
                self.error(f"{variable}={text!r} is neither true nor false")
            default = text.lower() in _TRUE
        self.add_argument(
            f"--{name}",
            dest=destination(name),
            action=argparse.BooleanOptionalAction,
            default=default,
            help=_help(help, variable, None),
        )

    def _from_environment(
        self,
        variable: str,
        text: str,
        parse: Callable[[str], Any],
        choices: Sequence[str] | None,
        *,
        repeat: bool,
    ) -> Any:
        parts = [part for part in text.split(",") if part] if repeat else [text]
        values = []
        for part in parts:
            try:
                value = parse(part)
            except (ValueError, argparse.ArgumentTypeError) as error:
                self.error(f"{variable}={part!r} can't be used: {error}")
            if choices and value not in choices:
                self.error(f"{variable}={part!r} is not one of {', '.join(choices)}")
            values.append(value)
        return tuple(values) if repeat else values[0]

    def misspelt_environment(self, known: frozenset[str], *, alike: float = 0.93) -> list[str]:
        """A sentence for each `UPKEEP_…` variable that looks like a misspelt one of `known`.

        alike: 0 to 1, how much it must look like one; 0 takes every unknown one for misspelt.
        """
        sentences = []
        for name in sorted(self._environ):
            if not name.startswith("UPKEEP_") or name in known or _OF_A_SERVICE.fullmatch(name):
                continue
            near = difflib.get_close_matches(name, known, n=1, cutoff=alike)
            if near:
                sentences.append(f"the variable {name} is not known; did you mean {near[0]}?")
        return sentences

    def error(self, message: str) -> NoReturn:
        """Print one sentence, not the whole usage, and end with status 2."""
        message = message.replace("unrecognized arguments:", "unknown flag or argument:")
        sys.stderr.write(f"{self.prog}: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)


class _Repeat(argparse.Action):
    """Collect repeated flags into a tuple; the first one replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = f"_given_{self.dest}"
        earlier = getattr(namespace, self.dest) if getattr(namespace, given, False) else ()
        setattr(namespace, self.dest, (*earlier, values))
        setattr(namespace, given, True)


def destination(name: str) -> str:
    """The attribute under which argparse keeps a flag's value."""
    return name.replace(".", "_").replace("-", "_")


def _help(text: str, variable: str, default: Any) -> str:
    match default:
        case None | "" | ():
            shown = ""
        case (str(host), int(port)):  # as `listen_address` reads it
            shown = f", default {host}:{port}"
        case _:
            shown = f", default {default}"
    return f"{text} [{variable}{shown}]".replace("%", "%%")


def listen_address(text: str) -> tuple[str, int]:
    """Read `:9790`, `127.0.0.1:9790` or `[::1]:9790`; an empty host means every address."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not host:port or :port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise argparse.ArgumentTypeError(f"{text!r}: an IPv6 address stands in brackets")
    return host, int(port)


def path(text: str) -> Path:
    """Read a path; an empty one, of a variable that isn't set, would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a path, or leave the flag out")
    return Path(text)


def node_name(text: str) -> str:
    """Read a name as Kubernetes gives it to nodes, always in lower case."""
    if not text or text != text.lower():
        raise argparse.ArgumentTypeError(f"{text!r} is no node's name: they are lower case")
    return text


def duration(text: str) -> float:
    """Read `30`, `30s`, `5m`, `2h` or `14d` as seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    if not number.isascii() or not number.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 30s, 5m, 2h or 14d")
    if (seconds := float(number) * units[unit]) > _LONGEST:
        raise argparse.ArgumentTypeError(f"{text[:30]!r} is longer than a hundred years")
    return seconds
