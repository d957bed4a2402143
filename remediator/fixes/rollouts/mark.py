"""The one annotation that Upkeep keeps on a stuck Deployment's newest ReplicaSet.

It says who is acting right now (so that two executors never act on one Deployment) and whether
acting on this very ReplicaSet has failed before (so that it is never tried again). It names the
ReplicaSet's own uid, because `kubectl rollout undo` copies annotations to the Deployment and from
there to others: a copy means nothing.
"""

import msgspec

from exporter.checks.objects import UNSTICK, ReplicaSet


class Mark(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    replica_set: str
    """The uid of the ReplicaSet it was written on."""
    holder: str = ""
    """Who acts now; empty if nobody."""
    until: float = 0.0
    """Unix time after which a holder that didn't renew is taken for dead."""
    failed: str = ""
    """Why acting on it failed once; empty if it didn't."""


def mark_of(replica_set: ReplicaSet) -> Mark:
    """What the annotation says; an absent, broken or copied one says nothing."""
    try:
        mark = msgspec.json.decode(replica_set.unstick, type=Mark)
    except msgspec.DecodeError:
        mark = Mark("")
    return mark if mark.replica_set == replica_set.uid else Mark(replica_set.uid)


def annotation(mark: Mark) -> dict[str, dict[str, dict[str, str | None]]]:
    """The merge patch that writes the mark, or removes it where it says nothing."""
    empty = not mark.holder and not mark.failed
    text = None if empty else msgspec.json.encode(mark).decode()
    return {"metadata": {"annotations": {UNSTICK: text}}}
