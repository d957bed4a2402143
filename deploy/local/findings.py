"""What an exporter sees, in a sentence or two for each condition, for people at a terminal."""

from collections.abc import Iterator, Sequence

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_SHOWN = 3  # of each kind; the rest is counted


def sentences(metrics: str, *, rollouts_off: str = "") -> Iterator[str]:
    """What the exporter's /metrics page says, condition by condition.

    rollouts_off: why rollouts aren't looked at; empty where they are.
    """
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    failing = [
        sample.labels["collector"]
        for sample in samples.get("upkeep_scrape_collector_success", ())
        if sample.value == 0
    ]
    yield from _certificates(samples)
    yield from _zombies(samples)
    if rollouts_off:
        yield f"rollouts: {rollouts_off}"
    elif "rollouts" not in failing:
        yield from _rollouts(samples)
    for name in failing:
        yield f"{name}: can't be seen now; see the exporter's log"


def _certificates(samples: dict[str, list[Sample]]) -> Iterator[str]:
    found = sorted(samples.get("upkeep_certificate_expiry_days", ()), key=lambda s: s.value)
    if not found:
        yield "certificates: none where kubeadm, Kubespray, k3s and the kubelet keep theirs"
    else:
        first = found[0]
        kubeadm = sum(1 for s in found if s.labels["managed_by"] == "kubeadm")
        ends = f"ends in {first.value:.1f} days"
        if first.value < 0:
            ends = f"ended {-first.value:.1f} days ago"
        yield (
            f"certificates: {len(found)} found, {kubeadm} of them kubeadm's; "
            f"{first.labels['name']} ({first.labels['path']}) {ends}, before all others"
        )
    errors = samples.get("upkeep_certificate_read_errors", ())
    for sample in errors[:_SHOWN]:
        yield f"certificates: {sample.labels['path']} can't be read: {sample.labels['reason']}"
    yield from _more("certificates", errors, "can't be read")
    for sample in samples.get("upkeep_certificate_stale", ()):
        if sample.value == 1:
            component, name = sample.labels["component"], sample.labels["name"]
            yield f"certificates: {component} still uses an older {name} than the one on disk"


def _zombies(samples: dict[str, list[Sample]]) -> Iterator[str]:
    found = samples.get("upkeep_zombie_processes", ())
    host = sum(s.value for s in found if not s.labels["container"])
    inside = sorted((s for s in found if s.labels["container"] and s.value), key=lambda s: -s.value)
    if not host and not inside:
        yield "zombies: none so far (one counts once it has been seen as one for 30 s)"
    for sample in inside[:_SHOWN]:
        where = f"{sample.labels['namespace']}/{sample.labels['pod']} {sample.labels['container']}"
        yield f"zombies: {sample.value:.0f} in {where}"
    yield from _more("zombies", inside, "have some")
    if host:
        yield f"zombies: {host:.0f} of the host's own, which Upkeep counts and leaves alone"
    limits = {tuple(s.labels.items()): s.value for s in samples.get("upkeep_pids_limit", ())}
    for sample in samples.get("upkeep_pids_used", ()):
        limit = limits.get(tuple(sample.labels.items()))
        if limit and not sample.labels["pod"]:
            share = sample.value / limit
            yield f"zombies: {sample.value:.0f} of {limit:.0f} process slots taken ({share:.1%})"


def _rollouts(samples: dict[str, list[Sample]]) -> Iterator[str]:
    stuck = samples.get("upkeep_rollout_stuck_seconds", ())
    if not stuck:
        yield "rollouts: none is stuck"
    helps = {
        (s.labels["namespace"], s.labels["deployment"]): s.value
        for s in samples.get("upkeep_rollout_unstickable", ())
    }
    words = {1.0: "would help", 0.0: "would not help", None: "might or might not help"}
    for sample in stuck[:_SHOWN]:
        namespace, deployment = sample.labels["namespace"], sample.labels["deployment"]
        yield (
            f"rollouts: {namespace}/{deployment} stuck for {sample.value:.0f} s "
            f"({sample.labels['reason']}); freeing its old pods "
            f"{words[helps.get((namespace, deployment))]}"
        )
    yield from _more("rollouts", stuck, "are stuck")


def _more(what: str, found: Sequence[Sample], which: str) -> Iterator[str]:
    if len(found) > _SHOWN:
        yield f"{what}: {len(found) - _SHOWN} more {which}"
