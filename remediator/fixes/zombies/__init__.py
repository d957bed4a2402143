"""`reap-zombies`: clears the stuck zombies of one container without hurting anyone.

fix.py looks and reports, parents.py says what a zombie's parent is, plan.py how far to go,
ladder.py and restart.py go there, signals.py hits one process and no other, and facts.py knows what
only the cluster or a file knows.
"""

from remediator.fixes.zombies.fix import ReapZombies
from remediator.fixes.zombies.plan import Level, Settings

__all__ = ["Level", "ReapZombies", "Settings"]
