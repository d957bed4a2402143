"""The codes with which the fix ends, apart from success."""

SKIPPED = (
    "ConditionCleared",
    "NotSelected",
    "Paused",
    "GenerationBehind",
    "NoNewestReplicaSet",
    "Terminating",
    "Nominated",
    "ScaleUpTriggered",
    "BelowActLimit",
    "Recreate",
    "NotForLackOfRoom",
    "CannotBeKnown",
    "FitsNow",
    "NothingToFree",
    "DoesNotFit",
    "CannotChoosePod",
    "WouldStopService",
    "TooFewAvailable",
    "DisruptionBudget",
    "NodeOptedOut",
    "FailedBefore",
    "OptedOut",
    "AlreadyActing",
    "TargetReplaced",
    "Superseded",
)
FAILED = (
    "NewPodCrashes",
    "NewPodDoesNotStart",
    "NewPodNotAvailable",
    "RoomTaken",
    "ChangedMeanwhile",
    "ApiRefused",
    "ApiUnavailable",
    "Interrupted",
    "NotRestored",
    "StillStuck",
    # Between two steps, once something was done:
    "OptedOut",
    "Paused",
    "NoNewestReplicaSet",
    "AlreadyActing",
    "TargetReplaced",
    "Superseded",
)
FINAL = frozenset(
    {"NewPodCrashes", "NewPodDoesNotStart", "NewPodNotAvailable", "RoomTaken", "NotRestored"}
)
"""Failures of the new ReplicaSet's own: it is never tried again."""
