"""apt-get with package lists of our own, so that it needs no root and changes nothing.

The machine's own lists may be missing or old, and its third-party sources may be out of reach.
So the distribution's own sources are picked from its configuration (same mirror, same keyring)
and read into a private folder. All other settings of the machine, such as a proxy, stay in force.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from deploy.local.cache import Progress, exclusive

LISTS_MAX_AGE_SECONDS = 24 * 3600
_ARCHIVES = ("debian", "ubuntu")
_COMPONENTS = ("main", "universe")  # Ubuntu keeps Prometheus and the like in universe

Kind = Literal["deb", "deb-src"]


class DebianError(RuntimeError):
    """A package could not be had; the message names it and what to do."""


@dataclass(frozen=True)
class Source:
    """One place that packages come from, as in a stanza of sources.list(5)."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    """A path, a fingerprint, or a whole key on several lines; empty: apt's trusted keys."""

    def distribution_part(self, codename: str) -> Source | None:
        """What of it is this release of Debian's or Ubuntu's own archive, on whatever mirror.

        Third parties use the same suite names, so the place must also look like such an archive
        (`…/debian`, `…/debian-security`, `…/ubuntu`) and have its component `main`.
        """
        wanted = {codename, f"{codename}-updates", f"{codename}-security"}
        suites = tuple(suite for suite in self.suites if suite.partition("/")[0] in wanted)
        paths = [re.split(r"[/:]+", uri.rstrip("/"))[2:] for uri in self.uris]
        is_archive = all(
            "ppa" not in path and any(part.startswith(_ARCHIVES) for part in path) for path in paths
        )
        components = tuple(c for c in self.components if c in _COMPONENTS)
        if not (suites and is_archive and components):
            return None
        return replace(self, suites=suites, components=components)

    def stanza(self, kind: Kind) -> str:
        """The deb822 text for a `.sources` file."""
        lines = [
            f"Types: {kind}",
            f"URIs: {' '.join(self.uris)}",
            f"Suites: {' '.join(self.suites)}",
            f"Components: {' '.join(self.components)}",
        ]
        if self.signed_by:
            lines.append(f"Signed-By: {self.signed_by}")
        return "\n".join(lines) + "\n"


def machine_sources(etc_apt: Path) -> list[Source]:
    """Every enabled binary source in sources.list and sources.list.d, third parties included."""
    found: list[Source] = []
    parts = etc_apt / "sources.list.d"
    for path in [etc_apt / "sources.list", *sorted(parts.glob("*.list"))]:
        if path.is_file():
            found.extend(_one_line_sources(path.read_text(errors="replace")))
    for path in sorted(parts.glob("*.sources")):
        found.extend(_deb822_sources(path.read_text(errors="replace")))
    return found


def _one_line_sources(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        matched = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]*)", line)
        if matched:
            options, uri, suite, components = matched.groups()
            signed_by = re.search(r"signed-by=(\S+)", options or "")
            yield Source(
                (uri,), (suite,), tuple(components.split()), signed_by[1] if signed_by else ""
            )


def _deb822_sources(text: str) -> Iterator[Source]:
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    for stanza in re.split(r"\n\s*\n", text):
        fields = {
            name.lower(): value.rstrip()
            for name, value in re.findall(
                r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t]+.*)*)", stanza, re.MULTILINE
            )
        }
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").lower() in {"no", "false", "0", "off"}:
            continue
        yield Source(
            tuple(fields.get("uris", "").split()),
            tuple(fields.get("suites", "").split()),
            tuple(fields.get("components", "").split()),
            fields.get("signed-by", ""),
        )


def codename() -> str:
    """This release of Debian or Ubuntu, such as "bookworm"; empty on another system."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return ""
    return release.get("VERSION_CODENAME", "") if release.get("ID") in _ARCHIVES else ""


def apt_get(
    kind: Kind, arguments: Sequence[str], *, state: Path, directory: Path, progress: Progress
) -> str:
    """Run apt-get in `directory`, with lists of this kind kept in the folder `state`; its output.

    A failure is tried once more with fresh lists, as a mirror drops a version once it is
    superseded. Raises DebianError with apt's last lines.
    """
    own = state / kind
    lock = state / f"{kind}.lock"
    reading = "reading Debian's package lists"
    with exclusive(lock, reading, progress):
        configuration = _write_configuration(own, kind)
        stamp = own / "updated"
        fresh = _age_seconds(stamp) > LISTS_MAX_AGE_SECONDS
        if fresh:
            _update(configuration, stamp, progress)
    try:
        return _run(configuration, arguments, directory, progress)
    except DebianError:
        if fresh:
            raise
    with exclusive(lock, reading, progress):
        _update(configuration, stamp, progress)
    return _run(configuration, arguments, directory, progress)


def _age_seconds(stamp: Path) -> float:
    try:
        return time.time() - stamp.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _update(configuration: Path, stamp: Path, progress: Progress) -> None:
    progress("reading Debian's package lists")
    strict = ["-o", "APT::Update::Error-Mode=any"]  # else apt calls a failed fetch a success
    try:
        _run(configuration, ["update", *strict], configuration.parent, progress)
    except DebianError as error:
        if not stamp.exists():
            raise
        progress(f"going on with the package lists of an earlier run: {error}")
        return
    stamp.touch()


def _run(configuration: Path, arguments: Sequence[str], directory: Path, progress: Progress) -> str:
    lines = []
    with subprocess.Popen(
        ["apt-get", "--config-file", str(configuration), "--quiet", *arguments],
        cwd=directory,
        env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("Get:"):
                progress("  " + line.strip())
    if process.returncode != 0:
        raise DebianError(
            f"apt-get {' '.join(arguments)} failed; is the Debian mirror reachable?\n"
            + "".join(lines[-10:]).rstrip()
        )
    return "".join(lines)


def _write_configuration(own: Path, kind: Kind) -> Path:
    """Apt's settings on this machine stay; sources, state and cache become ours, hooks go."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (own / folder).mkdir(parents=True, exist_ok=True)
    release = codename()
    parts = [source.distribution_part(release) for source in machine_sources(Path("/etc/apt"))]
    sources = [part for part in parts if part]
    if not sources:
        raise DebianError(
            f"no source of {release}'s own archive (main) stands in /etc/apt/sources.list or "
            "sources.list.d; add the one that this system was installed from"
        )
    _replace(own / "debian.sources", "\n".join(source.stanza(kind) for source in sources))
    configuration = own / "apt.conf"
    _replace(
        configuration,
        f'Dir::Etc::sourcelist "{own}/debian.sources";\n'
        'Dir::Etc::sourceparts "/dev/null";\n'
        f'Dir::State "{own}/state";\n'
        f'Dir::Cache "{own}/cache";\n'
        'APT::Sandbox::User "root";\n'  # user _apt can't write to a cache in somebody's home
        'Acquire::Retries "3";\n'
        'Acquire::Languages "none";\n'
        "#clear APT::Update::Pre-Invoke;\n"
        "#clear APT::Update::Post-Invoke;\n"
        "#clear APT::Update::Post-Invoke-Success;\n",
    )
    return configuration


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")  # callers hold the lock
    temporary.write_text(text)
    temporary.rename(path)
