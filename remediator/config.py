"""The remediator's configuration file: every option, its default and what it means.

One YAML file, read strictly: an option that isn't known is an error with its line, because a
guardrail that was misspelt is a guardrail that isn't there.
"""

import argparse
import re
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from exporter.flags import duration
from exporter.yaml_source import ConfigError, Source, read_source
from remediator.matchers import Matcher
from remediator.windows import Window

__all__ = ["Config", "ConfigError", "FixPolicy", "Mode", "OptOut", "Seconds", "load", "parse"]


Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Bytes = Annotated[int, msgspec.Meta(ge=1024, le=1 << 40)]

_PATTERN = re.compile(r"[a-z0-9*.-]+")
_OF_NAMESPACE = re.compile(r"\*|[a-z0-9*.-]+/[a-z0-9*.-]+")


class Seconds(float):
    """A span of time: `30`, `30s`, `5m`, `2h` or `14d` in the file."""


class Mode(StrEnum):
    """How far a fix may go by itself."""

    ENFORCE = "enforce"
    DRY_RUN = "dry-run"  # checks and decides, says what it would do, does nothing
    APPROVAL = "approval"  # waits for `upkeep-remediator approve`
    OFF = "off"  # its alerts are counted and forgotten


class FixPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The guardrails of one fix."""

    mode: Mode = Mode.ENFORCE
    """How far it may go by itself."""
    cooldown: Seconds = Seconds(600)
    """Rest for a target after the fix acted on it, whatever came of it; likewise for its workload,
    where pods come back under new names."""
    max_acts: Annotated[int, msgspec.Meta(le=1_000_000)] = 20
    """More than this many acts within `window` is a storm: the fix pauses until resumed."""
    window: Seconds = Seconds(3600)
    """The span in which `max_acts` are counted."""
    max_concurrent: Annotated[int, msgspec.Meta(le=1000)] = 1
    """How many may run at once."""
    maintenance_windows: tuple[Window, ...] = ()
    """When it may act; outside it waits. Without any: always."""
    expires: Seconds = Seconds(86400)
    """How long one waits for approval or a window before it is given up; not where approved."""
    pause_after_failure: bool = False
    """Pause the fix once it has failed, until a person resumes it."""
    settings: dict[str, Any] = {}
    """The fix's own options, described with the fix."""

    def __post_init__(self) -> None:
        """Limits that would switch a guardrail off by accident are refused."""
        if self.max_acts < 1:
            raise ValueError("max_acts must be 1 or more; to act never, use mode: off")
        if self.max_concurrent < 1:
            raise ValueError("max_concurrent must be 1 or more; to act never, use mode: off")
        if self.window <= 0 or self.expires <= 0:
            raise ValueError("window and expires must be longer than nothing")


class OptOut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What no fix may touch, known without asking the API. `*` stands for any characters."""

    nodes: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    pods: tuple[str, ...] = ()
    """namespace/pod."""
    deployments: tuple[str, ...] = ()
    """namespace/deployment."""

    def __post_init__(self) -> None:
        """What could never match anything forbids nothing, whoever wrote it."""
        for kind, patterns in msgspec.structs.asdict(self).items():
            whole = kind in ("pods", "deployments")
            for pattern in patterns:
                if not (_OF_NAMESPACE if whole else _PATTERN).fullmatch(pattern):
                    wanted = f"namespace/{kind[:-1]}" if whole else f"the name of a {kind[:-1]}"
                    raise ValueError(
                        f"{kind}: {pattern[:100]!r} would match nothing; write {wanted} in lower "
                        "case, * for any characters"
                    )


class JournalOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of the journal."""

    max_bytes: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 40)] = 256 << 20
    """What webhooks may fill of the file; when full, they get 503."""
    max_records: Count = 10_000
    """Ended remediations kept, refusals dropped first."""
    max_age: Seconds = Seconds(90 * 86400)
    """How long ended remediations are kept."""
    max_active: Count = 20_000
    """Remediations that may wait or run; beyond it webhooks get 503."""


class WebhookOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the HTTP server accepts."""

    bearer_token_file: str = ""
    """File whose content authorises requests as `Authorization: Bearer …`; read again on change."""
    allow_unauthenticated: bool = False
    """Listen beyond loopback with neither credentials nor client certificates."""
    max_body_bytes: Bytes = 32 << 20
    """Largest message; a larger one gets 413, which Alertmanager doesn't retry."""
    max_bytes_in_flight: Bytes = 64 << 20
    """All bodies being read at once; beyond it 503, which Alertmanager retries."""
    body_timeout: Seconds = Seconds(10)
    """How long a client may take to send its message."""
    max_connections: Count = 512
    """Beyond it idle ones are closed, first those that never asked anything."""

    def __post_init__(self) -> None:
        """Limits that no message could keep are refused."""
        if self.body_timeout <= 0:
            raise ValueError("body_timeout must be longer than nothing")
        if self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError("max_bytes_in_flight must hold one message of max_body_bytes")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    fixes: dict[str, FixPolicy] = {}
    """Guardrails by fix."""
    opt_out: OptOut = OptOut()
    matchers: tuple[Matcher, ...] = ()
    """Other people's alerts that ask for a fix, first match wins."""
    journal: JournalOptions = JournalOptions()
    webhook: WebhookOptions = WebhookOptions()
    shutdown_grace: Seconds = Seconds(60)
    """How long a stopping daemon lets running fixes finish before they undo."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fixes: dict[str, Any] = {}
    opt_out: OptOut = OptOut()
    matchers: tuple[Matcher, ...] = ()
    journal: JournalOptions = JournalOptions()
    webhook: WebhookOptions = WebhookOptions()
    shutdown_grace: Seconds = Seconds(60)


DEFAULTS: Mapping[str, FixPolicy] = {
    "rotate-certificates": FixPolicy(
        cooldown=Seconds(3600),
        max_acts=2,
        window=Seconds(86400),
        pause_after_failure=True,
    ),
    "reap-zombies": FixPolicy(
        cooldown=Seconds(300), max_acts=30, window=Seconds(3600), max_concurrent=2
    ),
    "unstick-rollout": FixPolicy(
        cooldown=Seconds(600), max_acts=30, window=Seconds(3600), max_concurrent=4
    ),
}


def hook(type_: type, value: Any) -> Any:
    """Read the types of this file that msgspec doesn't know; `ValueError` with a sentence."""
    if type_ is Seconds:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError("a duration such as 30s, 5m, 2h or 14d is wanted")
        try:
            return Seconds(duration(str(value)))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(str(error)) from None
    raise NotImplementedError(type_)


def parse(
    source: Source, fixes: Mapping[str, type[msgspec.Struct]], without_api: Collection[str] = ()
) -> tuple[Config, dict[str, Any]]:
    """The configuration and each fix's own settings; `ConfigError` with the line.

    fixes: the settings struct of each known fix. without_api: those that would need access to an
    API server and have none; they are off, and may not be asked for.
    """
    if not isinstance(source.value, dict):
        raise source.error("$", "options are wanted, `fixes:` and the like")
    file = source.convert(source.value, _File, "$", hook)
    policies: dict[str, FixPolicy] = {}
    settings: dict[str, Any] = {}
    for name in file.fixes:
        if name not in fixes:
            raise source.error(f"$.fixes.{name}", f"no such fix; known: {', '.join(sorted(fixes))}")
    for name, struct in fixes.items():
        path = f"$.fixes.{name}"
        given = file.fixes.get(name)
        if given is not None and not isinstance(given, dict):
            raise source.error(path, "options are wanted, `mode:` and the like")
        default = DEFAULTS.get(name, FixPolicy())
        if name in without_api:
            default = msgspec.structs.replace(default, mode=Mode.OFF)
        merged = {**_given(default), **(given or {})}
        if merged["mode"] is False:
            merged["mode"] = Mode.OFF  # as YAML reads a bare `off`
        policies[name] = source.convert(merged, FixPolicy, path, hook)
        if name in without_api and policies[name].mode is not Mode.OFF:
            raise source.error(
                f"{path}.mode",
                f"{name} acts through the API server, and no access to one is known: give "
                "--kubeconfig FILE (or set KUBECONFIG), or leave the mode out, which is off then",
            )
        settings[name] = source.convert(policies[name].settings, struct, f"{path}.settings", hook)
    for index, matcher in enumerate(file.matchers):
        if matcher.fix not in fixes:
            known = ", ".join(sorted(fixes))
            raise source.error(f"$.matchers[{index}].fix", f"no such fix; known: {known}")
    longest = max((max(p.cooldown, p.window) for p in policies.values()), default=0.0)
    if file.journal.max_age < longest:
        raise source.error(
            "$.journal.max_age", "shorter than a cooldown or window, which would forget acts"
        )
    values = {f: getattr(file, f) for f in _File.__struct_fields__ if f != "fixes"}
    return Config(fixes=policies, **values), settings


def _given(policy: FixPolicy) -> dict[str, Any]:
    names = ("mode", "cooldown", "max_acts", "window", "max_concurrent", "pause_after_failure")
    plain = {name: getattr(policy, name) for name in names}
    return {k: float(v) if isinstance(v, Seconds) else v for k, v in plain.items()}


def load(
    path: Path | None,
    fixes: Mapping[str, type[msgspec.Struct]],
    without_api: Collection[str] = (),
) -> tuple[Config, dict[str, Any]]:
    """Read the file, see `parse`; without one, the defaults."""
    source = Source("", "defaults") if path is None else read_source(path)
    return parse(source, fixes, without_api)


def listed(patterns: tuple[str, ...], name: str) -> str:
    """The first pattern that `name` matches, or nothing."""
    for pattern in patterns:
        if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name):
            return pattern
    return ""
