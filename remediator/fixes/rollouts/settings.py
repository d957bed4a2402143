"""The options of `unstick-rollout`, as in the section `rollouts` of the remediator's file."""

import msgspec

from remediator.config import Seconds


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it acts on, how far it goes, and how long it waits."""

    selector: str = "akash.network/manifest-service"
    """Label selector of the Deployments to act on; empty means every one. The exporter's
    --rollouts.selector decides which ones raise an alert."""
    min_stuck: Seconds = Seconds(60)
    """How long a rollout must have been stuck before anything is done. The shipped rule waits for
    two minutes of its own."""
    allow_none_available: str = "akash.network/manifest-service"
    """Label selector of the Deployments that may be left without any available pod while the new
    one starts (a service of one replica); `!*` means none, empty means every one."""
    extra_unavailable: int = 1
    """How many pods fewer than the Deployment's own maxUnavailable leaves may be available for the
    time of a step; of those that have a node."""
    respect_disruption_budgets: bool = True
    """Whether a PodDisruptionBudget without a disruption left forbids freeing a pod."""
    come_up_timeout: Seconds = Seconds(150)
    """How long a new pod may take from the old one's end to being available; then it is undone."""
    settle: Seconds = Seconds(10)
    """How long a new pod must stay available without a restart before it counts as come up."""
    most_restarts: int = 3
    """Restarts of a new pod's containers after which it counts as crashing; then it is undone."""
    undo_timeout: Seconds = Seconds(600)
    """How long the old pods are tried to be brought back before that is given up (NotRestored)."""
    deadline: Seconds = Seconds(900)
    """How long the whole may take; what is open then is undone."""
    delete_old_replica_sets: bool = False
    """Whether the emptied old ReplicaSets are deleted once the rollout is complete. That loses the
    history that kubectl rollout undo needs."""
    poll: Seconds = Seconds(1)
    """Pause between two looks at the cluster while waiting."""

    def __post_init__(self) -> None:
        """Values with which nothing could work, or an undo would not, are refused."""
        if self.min_stuck < 0 or self.settle < 0:
            raise ValueError("min_stuck and settle can't be negative")
        if self.undo_timeout <= 0 or self.poll <= 0:
            raise ValueError("undo_timeout and poll must be longer than nothing")
        if self.settle >= self.come_up_timeout:
            raise ValueError("come_up_timeout must be longer than settle, or no pod comes up in it")
        if self.deadline <= self.come_up_timeout:
            raise ValueError("deadline must be longer than come_up_timeout, or no step fits in it")
        if self.extra_unavailable < 0:
            raise ValueError("extra_unavailable can't be negative")
        if self.most_restarts < 1:
            raise ValueError("most_restarts must be 1 or more")
