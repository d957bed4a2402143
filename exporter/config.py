"""What the exporter's flags mean, as one frozen value that everything else is built from."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter import logs
from exporter.flags import (
    FlagParser,
    destination,
    duration,
    environment_name,
    listen_address,
    node_name,
    path,
)

COLLECTOR_NAMES = ("certificates", "zombies", "rollouts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The exporter's settings; `parse` makes them of flags and environment."""

    listen: tuple[str, int] = ("", 9790)
    """Host (empty: every address) and port."""
    web_config_file: Path | None = None
    """The exporter-toolkit web configuration: TLS, client CA, basic auth."""
    collectors: tuple[str, ...] = COLLECTOR_NAMES
    """Enabled collectors, in the order of COLLECTOR_NAMES."""
    procfs: Path = Path("/proc")
    rootfs: Path = Path("/")
    """Where the host's file system is seen: `/` on the host, a mount in a container."""
    cgroupfs: Path = Path("/sys/fs/cgroup")
    certificate_paths: tuple[str, ...] = ()
    """Globs below rootfs; empty means the known layouts."""
    certificate_endpoints: tuple[str, ...] = ()
    """host:port; empty means the components found on a control plane."""
    zombies_min_age: float = 30.0
    """Seconds a zombie must have been seen as one before it counts."""
    rollouts_selector: str = "akash.network/manifest-service"
    """Label selector of the Deployments to look at; empty means every one."""
    kubeconfig: Path | None = None
    """None: $KUBECONFIG's place is taken by in-cluster credentials where there are any."""
    node_name: str = ""
    log_level: str = "info"
    log_format: str = "logfmt"
    check: str = ""
    """Print this collector's findings once, as a table, instead of serving."""
    output: str = "table"


def parser(environ: Mapping[str, str] | None = None) -> FlagParser:
    """The exporter's flags, each with its environment twin."""
    flags = FlagParser(
        prog="upkeep-exporter",
        environ=environ,
        description="Publishes certificate expiry, zombie processes and stuck rollouts as "
        "Prometheus metrics. It only reads.",
    )
    default = Config()
    flags.flag(
        "web.listen-address",
        default=default.listen,
        parse=listen_address,
        metavar="[HOST]:PORT",
        help="where to listen; an empty host means every address",
    )
    flags.flag(
        "web.config.file",
        parse=path,
        metavar="FILE",
        help="exporter-toolkit web configuration (TLS, client CA, basic auth)",
    )
    for name in COLLECTOR_NAMES:
        flags.switch(f"collector.{name}", default=True, help=f"the {name} collector")
    for name, what in (
        ("procfs", "the proc file system of the host"),
        ("rootfs", "the root file system of the host"),
        ("cgroupfs", "the cgroup file system of the host"),
    ):
        flags.flag(
            f"path.{name}", default=getattr(default, name), parse=path, metavar="DIR", help=what
        )
    flags.flag(
        "certificates.path",
        default=(),
        repeat=True,
        metavar="GLOB",
        help="certificates and kubeconfigs to read, repeatable; "
        "default: where kubeadm, Kubespray, k3s and the kubelet keep theirs",
    )
    flags.flag(
        "certificates.endpoint",
        default=(),
        parse=_endpoint,
        repeat=True,
        metavar="HOST:PORT",
        help="TLS endpoints whose served certificate is read, repeatable; "
        "default: the components of a control plane on this node",
    )
    flags.flag(
        "zombies.min-age",
        default=default.zombies_min_age,
        parse=duration,
        metavar="DURATION",
        help="how long a zombie must have been one before it counts",
    )
    flags.flag(
        "rollouts.selector",
        default=default.rollouts_selector,
        metavar="SELECTOR",
        help="label selector of the Deployments to look at; --rollouts.selector= means every one",
    )
    flags.flag(
        "kubeconfig",
        parse=path,
        metavar="FILE",
        help="API access for rollouts; default: the pod's own service account, else $KUBECONFIG",
    )
    flags.flag(
        "node-name",
        parse=node_name,
        default=os.uname().nodename.lower(),
        metavar="NAME",
        help="this node's name in Kubernetes",
    )
    add_log_flags(flags)
    flags.add_argument(
        "--check",
        choices=COLLECTOR_NAMES,
        help="print this collector's findings once and exit, for hosts without Prometheus",
    )
    flags.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="format of --check"
    )
    return flags


def add_log_flags(flags: FlagParser) -> None:
    """`--log.level` and `--log.format`, the same for both programs."""
    flags.flag("log.level", default="info", choices=logs.LEVELS, help="least severity to log")
    flags.flag("log.format", default="logfmt", choices=logs.FORMATS, help="format of log lines")


def parse(
    arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> tuple[Config, list[str]]:
    """Read flags and environment; exits with one sentence where they are wrong.

    Returns the settings and warnings about the environment, to be logged once logging is set up.
    """
    flags = parser(environ)
    # `--rollouts.selector` may be set to nothing by its variable too: there, empty has a meaning.
    empty = environment_name("rollouts.selector")
    if (os.environ if environ is None else environ).get(empty) == "":
        flags.set_defaults(rollouts_selector="")
    given = flags.parse_args(arguments)
    collectors = tuple(n for n in COLLECTOR_NAMES if getattr(given, destination(f"collector.{n}")))
    if not collectors and not given.check:
        flags.error("every collector is turned off; leave at least one on")
    for name in ("procfs", "rootfs", "cgroupfs"):
        seen: Path = getattr(given, f"path_{name}")
        if name != "cgroupfs" and not seen.is_dir():
            flags.error(f"--path.{name}={seen} is not a directory; name the host's {name}")
    config = Config(
        listen=given.web_listen_address,
        web_config_file=given.web_config_file,
        collectors=(given.check,) if given.check else collectors,
        procfs=given.path_procfs,
        rootfs=given.path_rootfs,
        cgroupfs=given.path_cgroupfs,
        certificate_paths=given.certificates_path,
        certificate_endpoints=given.certificates_endpoint,
        zombies_min_age=given.zombies_min_age,
        rollouts_selector=given.rollouts_selector,
        kubeconfig=given.kubeconfig,
        node_name=given.node_name,
        log_level=given.log_level,
        log_format=given.log_format,
        check=given.check or "",
        output=given.output,
    )
    return config, flags.misspelt_environment(flags.variables)


def _endpoint(text: str) -> str:
    host, port = listen_address(text)
    if not host or not port:
        raise argparse.ArgumentTypeError(f"{text!r} is not host:port")
    return text
