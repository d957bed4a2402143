"""The options of `unstick-rollout`, as in the section `rollouts` of the remediator's file."""

import msgspec


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times are seconds."""

    selector: str = "akash.network/manifest-service"
    """Label selector of the Deployments to act on; empty means every one. The exporter's
    --rollouts.selector decides which ones raise an alert."""
    min_stuck: float = 60.0
    """How long a rollout must have been stuck before anything is done. The shipped rule waits for
    two minutes of its own."""
    allow_none_available: str = "akash.network/manifest-service"
    """Label selector of the Deployments that may be left without any available pod while the new
    one starts (a service of one replica); `!*` means none, empty means every one."""
    extra_unavailable: int = 1
    """How many pods fewer than the Deployment's own maxUnavailable leaves may be available for the
    time of a step."""
    respect_disruption_budgets: bool = True
    """Whether a PodDisruptionBudget without a disruption left forbids freeing a pod."""
    come_up_timeout: float = 150.0
    """How long a new pod may take from the old one's end to being available; then it is undone."""
    settle: float = 10.0
    """How long a new pod must stay available without a restart before it counts as come up."""
    most_restarts: int = 3
    """Restarts of a new pod's containers after which it counts as crashing; then it is undone."""
    undo_timeout: float = 600.0
    """How long the old pods are tried to be brought back before that is given up (NotRestored)."""
    deadline: float = 900.0
    """How long the whole may take; what is open then is undone."""
    delete_old_replica_sets: bool = False
    """Whether the emptied old ReplicaSets are deleted once the rollout is complete. That loses the
    history that kubectl rollout undo needs."""
    poll: float = 1.0
    """Pause between two looks at the cluster while waiting."""
