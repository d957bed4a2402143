"""A step and its record: what the body says is not lost, and no secret is kept (E42, E43)."""

import asyncio
from datetime import UTC, datetime

import pytest

from remediator.journal import JournalError
from remediator.model import FixError, Step, Steps


class Log:
    """Keeps what is recorded, until the disk is full."""

    def __init__(self) -> None:
        self.kept: list[Step] = []
        self.full = False
        self.steps = Steps(self.record, lambda: datetime.now(UTC))

    async def record(self, _index: int, step: Step) -> None:
        if self.full:
            raise JournalError("no space left on device")
        self.kept.append(step)


async def test_e42_what_a_step_says_of_its_failure_outlives_a_full_disk() -> None:
    log = Log()
    with pytest.raises(FixError, match="the file is in use"):
        async with log.steps.step("mend", "mend it"):
            log.full = True
            raise FixError("Refused", "the file is in use")
    assert [step.ok for step in log.kept] == [None]


async def test_e42_a_cancellation_outlives_a_full_disk() -> None:
    log = Log()

    async def work() -> None:
        async with log.steps.step("mend", "mend it"):
            log.full = True
            await asyncio.sleep(3600)

    task = asyncio.create_task(work())
    while not log.full:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_the_way_back_and_what_follows_it_take_no_step_from_each_other() -> None:
    written: dict[int, str] = {}

    async def record(index: int, step: Step) -> None:
        written[index] = step.name

    steps = Steps(record, lambda: datetime.now(UTC))
    back = steps.unfailing()
    for log, name in ((steps, "there"), (back, "back"), (steps, "unlock"), (back, "again")):
        async with log.step(name, name):
            pass
    assert written == {0: "there", 1: "back", 2: "unlock", 3: "again"}


async def test_a_step_that_went_well_and_cannot_be_recorded_ends_the_fix() -> None:
    log = Log()
    with pytest.raises(JournalError):
        async with log.steps.step("mend", "mend it"):
            log.full = True


@pytest.mark.parametrize(
    "secret",
    [
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA PRIVATE KEY-----\n",
        "-----BEGIN EC PRIVATE KEY-----\nMIIEowIBAAKCAQEA",
        "client-key-data: " + "TUlJRW93SUJBQUtDQVFFQQ" * 5,
    ],
)
async def test_e43_an_error_that_quotes_a_key_is_recorded_without_it(secret: str) -> None:
    log = Log()
    with pytest.raises(ValueError, match="can't read"):
        async with log.steps.step("mend", "mend it"):
            raise ValueError(f"can't read /etc/kubernetes/admin.conf: {secret}")
    result = log.kept[-1].result
    assert result.startswith("ValueError: can't read /etc/kubernetes/admin.conf:")
    assert not any(part in result for part in ("MIIEow", "TUlJRW"))


async def test_e43_digests_and_paths_are_kept() -> None:
    log = Log()
    said = f"sha256:{'a' * 64} differs from /var/lib/kubelet/pki/kubelet-client-current.pem"
    with pytest.raises(ValueError, match="sha256"):
        async with log.steps.step("mend", "mend it"):
            raise ValueError(said)
    assert log.kept[-1].result == f"ValueError: {said}"
