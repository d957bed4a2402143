"""The way back from a renewal: the old certificates in their place and in use again.

Half of it is worse than either of its ends. So it is gone to its end, whatever is cancelled
meanwhile and whether it can be recorded or not.
"""

from exporter.checks.certificates import Root
from remediator.fixes.certificates.backup import Backup
from remediator.fixes.certificates.plan import RotationPlan
from remediator.fixes.certificates.renewal import roll_back
from remediator.fixes.certificates.settings import Settings
from remediator.fixes.certificates.uptake import Uptake
from remediator.model import FixError, Steps
from remediator.shield import to_its_end


class WayBack:
    """On this node."""

    def __init__(self, settings: Settings, root: Root, uptake: Uptake) -> None:
        self._settings = settings
        self._root = root
        self._uptake = uptake

    async def go(
        self, plan: RotationPlan, backup: Backup, begun: float, steps: Steps, *, why: str
    ) -> None:
        """To its end. FixError where the old ones are not back in use then.

        begun: when the renewal was, Unix seconds.
        """
        if plan.recovery:  # the old ones have expired: nothing works with them
            raise FixError(
                "RenewalFailed",
                f"{why}; the old certificates have expired and were not put back: they are in "
                f"{backup.directory.name}",
            )
        await to_its_end(self._go(plan, backup, begun, steps.unfailing(), why=why))

    async def _go(
        self, plan: RotationPlan, backup: Backup, begun: float, steps: Steps, *, why: str
    ) -> None:
        try:
            layout = await roll_back(self._root, backup, steps)
        except Exception as error:
            raise FixError(
                "RollbackFailed",
                f"{why}; and the files of {backup.directory.name} are not all back: {error}",
            ) from error
        try:
            await self._uptake.restart(plan.components, layout, steps, since=begun)
            if plan.has_cluster and self._settings.restart != "none":
                # An API server that read the new ones by itself serves them for a minute more.
                await self._uptake.verify(plan.components, steps)
        except Exception as error:
            raise FixError(
                "RestartFailed", f"{why}; the old certificates were put back, but {error}"
            ) from error
