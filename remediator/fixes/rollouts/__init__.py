"""`unstick-rollout`: free a stuck Deployment's own old pods so that its new ones can run."""

from remediator.fixes.rollouts.settings import Settings
from remediator.fixes.rollouts.unstick import UnstickRollout

__all__ = ["Settings", "UnstickRollout"]
