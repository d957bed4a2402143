"""What every journal must do. A store's test module inherits this class and gives the fixture."""

import asyncio
from datetime import timedelta

import msgspec
import pytest

from remediator.journal import ConflictError, Journal, Pause
from remediator.model import Claim, Condition, Decision, Phase, Step, Target, Verdict
from tests.engine.support import NODE, STARTED, StubClock, request

ADMIT = Decision(verdict=Verdict.ADMIT, reason="Admitted", message="yes")
WAIT = Decision(verdict=Verdict.WAIT, reason="NeedsApproval", message="waits")
MINE = Claim(boot_id="boot-1", pid=100, start_time=5)
OTHER = Claim(boot_id="boot-1", pid=200, start_time=6)
SEEN = Condition(broken=True, reason="FileThere", message="there", workload="deployment/a/b")


async def acted(journal: Journal) -> None:
    await journal.accept([request()], "r1")
    await journal.admit("r1-0", ADMIT)
    await journal.claim("r1-0", MINE, SEEN, None)
    await journal.finish("r1-0", Phase.SUCCEEDED, "Mended", "yes", claim=MINE)


class JournalContract:
    """Each test gets an empty journal, and the clock that it reads."""

    async def test_a_new_request_is_pending(self, journal: Journal) -> None:
        accepted = await journal.accept([request()], "r1")
        assert (accepted.created, accepted.coalesced) == (1, 0)
        (found,) = await journal.due("mend-file", 10)
        assert (found.id, found.phase, found.target) == ("r1-0", Phase.PENDING, request().target)
        assert found.created_at == STARTED

    async def test_alerts_of_one_target_are_one_remediation(self, journal: Journal) -> None:
        several = [request(fingerprint=f"fp-{i}") for i in range(10)]
        accepted = await journal.accept(several, "r1")
        assert (accepted.created, accepted.coalesced) == (1, 9)
        whole = await journal.get("r1-0")
        assert whole is not None
        assert len(whole.alerts) == 10

    async def test_e3_the_same_alert_again_is_one_remediation(self, journal: Journal) -> None:
        for number in range(5):
            await journal.accept([request()], f"r{number}")
        assert len(await journal.find()) == 1
        await journal.admit("r0-0", ADMIT)
        await journal.accept([request()], "late")
        await journal.claim("r0-0", MINE, SEEN, None)
        await journal.accept([request()], "later")
        assert [r.phase for r in await journal.find()] == [Phase.RUNNING]

    async def test_after_the_end_the_same_alert_asks_anew(self, journal: Journal) -> None:
        await journal.accept([request()], "r1")
        await journal.finish("r1-0", Phase.FAILED, "Refused", "no")
        accepted = await journal.accept([request()], "r2")
        assert accepted.created == 1
        assert [r.id for r in await journal.find()] == ["r2-0", "r1-0"]

    async def test_e4_resolved_cancels_only_when_every_alert_has(self, journal: Journal) -> None:
        both = [request(fingerprint="a"), request(fingerprint="b")]
        await journal.accept(both, "r1")
        gone = await journal.accept([request(fingerprint="a", firing=False)], "r2")
        assert gone.cancelled == ()
        gone = await journal.accept([request(fingerprint="b", firing=False)], "r3")
        assert gone.cancelled == (("r1-0", "mend-file"),)
        found = await journal.get("r1-0")
        assert found is not None
        assert (found.phase, found.reason) == (Phase.SKIPPED, "AlertResolved")

    async def test_e4_resolved_never_touches_what_runs(self, journal: Journal) -> None:
        await journal.accept([request()], "r1")
        await journal.admit("r1-0", ADMIT)
        await journal.claim("r1-0", MINE, SEEN, None)
        gone = await journal.accept([request(firing=False)], "r2")
        assert gone.cancelled == ()
        assert [r.phase for r in await journal.find()] == [Phase.RUNNING]

    async def test_a_late_resolved_of_an_earlier_episode_is_ignored(self, journal: Journal) -> None:
        await journal.accept([request(starts_at=STARTED + timedelta(hours=1))], "r1")
        gone = await journal.accept([request(firing=False, starts_at=STARTED)], "r2")
        assert gone.cancelled == ()

    async def test_order_within_a_message_counts(self, journal: Journal) -> None:
        message = [
            request(),
            request(firing=False),
            request(starts_at=STARTED + timedelta(seconds=1)),
        ]
        accepted = await journal.accept(message, "r1")
        assert (accepted.created, len(accepted.cancelled)) == (2, 1)
        assert [r.phase for r in await journal.find()] == [Phase.PENDING, Phase.SKIPPED]

    async def test_resolved_then_firing_again_is_not_lost(self, journal: Journal) -> None:
        await journal.accept([request()], "r1")
        await journal.accept([request(firing=False)], "r2")
        again = await journal.accept([request(starts_at=STARTED + timedelta(minutes=1))], "r3")
        assert again.created == 1

    async def test_terminal_phases_never_change(self, journal: Journal) -> None:
        await journal.accept([request()], "r1")
        await journal.finish("r1-0", Phase.FAILED, "Refused", "no")
        for phase in (Phase.SUCCEEDED, Phase.SKIPPED, Phase.FAILED):
            with pytest.raises(ConflictError):
                await journal.finish("r1-0", phase, "Other", "other")
        with pytest.raises(ConflictError):
            await journal.admit("r1-0", ADMIT)
        with pytest.raises(ConflictError):
            await journal.claim("r1-0", MINE, SEEN, None)
        found = await journal.get("r1-0")
        assert found is not None
        assert (found.phase, found.reason, found.message) == (Phase.FAILED, "Refused", "no")

    async def test_only_one_claims(self, journal: Journal) -> None:
        await journal.accept([request()], "r1")
        with pytest.raises(ConflictError):
            await journal.claim("r1-0", MINE, SEEN, None)  # Pending: nobody has decided
        await journal.admit("r1-0", ADMIT)
        await journal.claim("r1-0", MINE, SEEN, None)
        with pytest.raises(ConflictError):
            await journal.claim("r1-0", OTHER, SEEN, None)
        with pytest.raises(ConflictError):
            await journal.claim("r1-0", OTHER, None, OTHER)  # not the owner it names
        taken = await journal.claim("r1-0", OTHER, None, MINE)
        assert taken.claim == OTHER
        assert taken.condition == SEEN  # as the first owner saw it

    async def test_steps_belong_to_the_owner(self, journal: Journal) -> None:
        await journal.accept([request()], "r1")
        await journal.admit("r1-0", ADMIT)
        await journal.claim("r1-0", MINE, SEEN, None)
        step = Step(name="mend", message="mend it", started_at=STARTED, data={"a": 1})
        await journal.record_step("r1-0", MINE, 0, step)
        with pytest.raises(ConflictError):
            await journal.record_step("r1-0", OTHER, 1, step)
        taken = await journal.claim("r1-0", OTHER, None, MINE)
        assert taken.steps == (step,)
        with pytest.raises(ConflictError):
            await journal.record_step("r1-0", MINE, 1, step)  # the dead one, back from a long sleep

    @pytest.mark.parametrize("claim", [MINE, None], ids=["lost", "never had"])
    @pytest.mark.parametrize("phase", [Phase.SKIPPED, Phase.FAILED])
    async def test_e34_who_has_not_the_claim_ends_nothing(
        self, journal: Journal, claim: Claim | None, phase: Phase
    ) -> None:
        await journal.accept([request()], "r0")
        await journal.finish("r0-0", Phase.SKIPPED, "Cooldown", "an earlier refusal")
        await journal.accept([request()], "r1")
        await journal.admit("r1-0", ADMIT)
        await journal.claim("r1-0", MINE, SEEN, None)
        await journal.claim("r1-0", OTHER, None, MINE)
        pause = Pause(fix="mend-file", since=STARTED, by="rule", why="r1", reason="PreviousFailed")
        with pytest.raises(ConflictError, match="claimed by process 200"):
            await journal.finish("r1-0", phase, "Cooldown", "no", claim=claim, pause=pause)
        assert await journal.pauses() == []
        assert [r.phase for r in await journal.find()] == [Phase.RUNNING, Phase.SKIPPED]
        done = await journal.finish("r1-0", Phase.SUCCEEDED, "Mended", "yes", claim=OTHER)
        assert done.phase is Phase.SUCCEEDED

    async def test_a_name_in_some_other_encoding_stands_in_nobodys_way(
        self, journal: Journal
    ) -> None:
        """As Python reads a file's name that isn't UTF-8."""
        odd = "the file caf\udce9 is there"
        shown = "the file caf\\udce9 is there"
        await journal.accept([request()], "r1")
        await journal.admit("r1-0", msgspec.structs.replace(ADMIT, message=odd))
        seen = msgspec.structs.replace(SEEN, message=odd)
        await journal.claim("r1-0", MINE, seen, None)
        step = Step(name="mend", message=odd, started_at=STARTED, result=odd)
        await journal.record_step("r1-0", MINE, 0, step)
        ended, accepted = await asyncio.gather(
            journal.finish("r1-0", Phase.FAILED, "Refused", odd, claim=MINE),
            journal.accept([request("web-2")], "r2"),
        )
        assert accepted.created == 1
        assert ended.condition is not None
        assert [ended.message, ended.condition.message, ended.steps[0].result] == [shown] * 3

    async def test_the_same_refusal_is_counted_not_added(
        self, journal: Journal, clock: StubClock
    ) -> None:
        for number in range(4):
            await journal.accept([request()], f"r{number}")
            clock.pass_time(60)
            await journal.finish(f"r{number}-0", Phase.SKIPPED, "Cooldown", f"ends at {number}")
        (found,) = await journal.find()
        assert (found.id, found.count, found.message) == ("r0-0", 4, "ends at 3")
        assert found.last_seen_at == found.ended_at == clock.now()
        assert (await journal.counts()).last == {("mend-file", Phase.SKIPPED): clock.now()}
        await journal.accept([request()], "r9")
        await journal.finish("r9-0", Phase.SKIPPED, "Paused", "another rule")
        assert [r.reason for r in await journal.find()] == ["Paused", "Cooldown"]

    async def test_waiting_ends_by_approval_or_expiry(
        self, journal: Journal, clock: StubClock
    ) -> None:
        await journal.accept([request()], "r1")
        await journal.wait("r1-0", WAIT, due_in=60, expires_in=100)
        assert await journal.due("mend-file", 10) == []
        await journal.approve("r1-0", "ada")
        (found,) = await journal.due("mend-file", 10)
        assert (found.approved_by, found.phase) == ("ada", Phase.PENDING)
        with pytest.raises(ConflictError):
            await journal.approve("r1-0", "bob")
        await journal.wait("r1-0", WAIT, due_in=60, expires_in=1000)
        clock.pass_time(101)  # the first wait set the expiry, the second didn't move it
        assert len(await journal.due("mend-file", 10)) == 1

    async def test_what_was_approved_is_not_looked_at_all_the_time_once_its_expiry_is_past(
        self, journal: Journal, clock: StubClock
    ) -> None:
        await journal.accept([request()], "r1")
        await journal.wait("r1-0", WAIT, due_in=60, expires_in=100)
        await journal.approve("r1-0", "ada")
        clock.pass_time(101)
        await journal.wait("r1-0", WAIT, due_in=60, expires_in=100)
        assert await journal.due("mend-file", 10) == []
        clock.pass_time(60)
        assert len(await journal.due("mend-file", 10)) == 1

    async def test_what_only_waits_is_looked_at_after_what_is_new_or_approved(
        self, journal: Journal, clock: StubClock
    ) -> None:
        for number in range(4):
            await journal.accept([request(f"web-{number}")], f"r{number}")
            if number < 3:
                await journal.wait(f"r{number}-0", WAIT, due_in=60, expires_in=1000)
        await journal.approve("r2-0", "ada")
        clock.pass_time(61)
        due = await journal.due("mend-file", 10)
        assert [found.id for found in due] == ["r2-0", "r3-0", "r0-0", "r1-0"]

    async def test_nobody_approves_what_has_expired(
        self, journal: Journal, clock: StubClock
    ) -> None:
        await journal.accept([request()], "r1")
        await journal.wait("r1-0", WAIT, due_in=60, expires_in=100)
        clock.pass_time(100)
        with pytest.raises(ConflictError, match="expires 2026-01-02 03:05:45 UTC"):
            await journal.approve("r1-0", "ada")

    async def test_pause_and_resume(self, journal: Journal) -> None:
        assert await journal.pause("mend-file", "ada", "looking into it")
        assert not await journal.pause("mend-file", "bob", "me too")
        (pause,) = await journal.pauses()
        assert (pause.by, pause.why, pause.reason) == ("ada", "looking into it", "Paused")
        assert await journal.resume("mend-file", "ada")
        assert not await journal.resume("mend-file", "ada")

    async def test_e40_nothing_begins_once_a_pause_is_durable(self, journal: Journal) -> None:
        await journal.accept([request()], "r1")
        await journal.admit("r1-0", ADMIT)
        await journal.pause("mend-file", "ada", "looking into it")
        with pytest.raises(ConflictError):
            await journal.claim("r1-0", MINE, SEEN, None)
        by_hand = await journal.begin(
            "mend-file", Target(node=NODE, pod="web-2"), "hand-1", "ada", MINE
        )
        await journal.claim(by_hand.id, MINE, SEEN, None)
        await journal.claim(by_hand.id, OTHER, None, MINE)  # what has begun is finished
        await journal.resume("mend-file", "ada")
        await journal.pause("mend-file", "the storm breaker", "too many", "StormBreaker")
        assert (await journal.claim("r1-0", MINE, SEEN, None)).phase is Phase.RUNNING

    async def test_an_end_and_the_pause_it_brings_are_one(self, journal: Journal) -> None:
        pause = Pause(fix="mend-file", since=STARTED, by="rule", why="r1", reason="PreviousFailed")
        await journal.accept([request()], "r1")
        await journal.finish("r1-0", Phase.FAILED, "Refused", "no", pause=pause)
        assert await journal.pauses() == [pause]
        await journal.resume("mend-file", "ada")
        with pytest.raises(ConflictError):  # ended already: nothing is paused for it again
            await journal.finish("r1-0", Phase.FAILED, "Refused", "no", pause=pause)
        assert await journal.pauses() == []
        await journal.pause("mend-file", "ada", "looking into it")
        await journal.accept([request()], "r2")
        await journal.finish("r2-0", Phase.FAILED, "Refused", "no", pause=pause)
        assert [p.by for p in await journal.pauses()] == ["ada"]

    async def test_resume_forgets_the_storm(self, journal: Journal) -> None:
        await journal.accept([request()], "r1")
        await journal.admit("r1-0", ADMIT)
        assert [a.counted for a in await journal.acts("mend-file", 60)] == [True]
        await journal.pause("mend-file", "the storm breaker", "too many", "StormBreaker")
        await journal.resume("mend-file", "ada")
        assert [a.counted for a in await journal.acts("mend-file", 60)] == [False]

    async def test_by_hand_respects_what_is_active(self, journal: Journal) -> None:
        target = Target(node=NODE, pod="web-1")
        begun = await journal.begin("mend-file", target, "hand-1", "ada", MINE)
        assert (begun.phase, begun.claim) == (Phase.ADMITTED, MINE)
        with pytest.raises(ConflictError, match="hand-1"):
            await journal.begin("mend-file", target, "hand-2", "bob", OTHER)
        accepted = await journal.accept([request()], "r1")
        assert (accepted.created, accepted.coalesced) == (0, 1)

    async def test_what_only_waits_gives_way_to_a_person(self, journal: Journal) -> None:
        """`run` is promised to wait for no approval and no window."""
        await journal.accept([request()], "r1")
        await journal.wait("r1-0", WAIT, due_in=60, expires_in=1000)
        target = request().target
        with pytest.raises(ConflictError, match="Pending already as r1-0"):
            await journal.begin("mend-file", target, "hand-1", "ada", MINE)
        await journal.begin("mend-file", target, "hand-2", "ada", MINE, instead=True)
        waited = await journal.get("r1-0")
        assert waited is not None
        assert (waited.phase, waited.reason) == (Phase.SKIPPED, "ByHand")
        assert waited.message == "ada asked for it by hand, which took its place."
        assert (await journal.accept([request()], "r2")).coalesced == 1
        with pytest.raises(ConflictError, match="Admitted already as hand-2"):
            await journal.begin("mend-file", target, "hand-3", "bob", OTHER, instead=True)

    async def test_an_id_may_be_shortened_while_it_is_unambiguous(self, journal: Journal) -> None:
        await journal.accept([request("web-1"), request("web-2")], "abcdef")
        assert await journal.get("abc") is None
        found = await journal.get("abcdef-1")
        assert found is not None
        assert found.target.pod == "web-2"
        assert await journal.get("abcdef-1%") is None

    async def test_old_records_go_and_refusals_first(
        self, journal: Journal, clock: StubClock
    ) -> None:
        for number in range(6):
            await journal.accept([request(f"web-{number}")], f"r{number}")
            if number % 2:
                await journal.finish(f"r{number}-0", Phase.SKIPPED, "Cooldown", "no")
            else:
                await journal.admit(f"r{number}-0", ADMIT)
                await journal.claim(f"r{number}-0", MINE, SEEN, None)
                await journal.finish(f"r{number}-0", Phase.SUCCEEDED, "Mended", "yes", claim=MINE)
        await journal.accept([request("web-9")], "r9")
        assert await journal.prune(max_age=3600, max_records=3) == 3
        assert [r.id for r in await journal.find()] == ["r9-0", "r4-0", "r2-0", "r0-0"]
        clock.pass_time(3601)
        assert await journal.prune(max_age=3600, max_records=3) == 3
        assert [r.id for r in await journal.find()] == ["r9-0"]  # active ones stay, however old

    @pytest.mark.parametrize("years", [30, -30])
    async def test_e36_no_step_of_the_clock_hides_or_drops_what_acted(
        self, journal: Journal, clock: StubClock, years: int
    ) -> None:
        await acted(journal)
        clock.pass_time(50)
        clock.step(years * 365 * 86400)
        assert await journal.prune(max_age=3600, max_records=0, horizon=60) == 0
        assert [act.id for act in await journal.acts("mend-file", 60)] == ["r1-0"]
        clock.pass_time(11)
        assert await journal.acts("mend-file", 60) == []
        assert await journal.prune(max_age=3600, max_records=0, horizon=60) == 1

    async def test_e36_a_clock_that_is_set_ahead_drops_no_history(
        self, journal: Journal, clock: StubClock
    ) -> None:
        await acted(journal)
        await journal.accept([request("web-2")], "r2")
        await journal.finish("r2-0", Phase.SKIPPED, "Cooldown", "no")
        clock.step(30 * 365 * 86400)
        clock.pass_time(3599)
        assert await journal.prune(max_age=3600, max_records=10) == 0
        clock.pass_time(2)
        assert await journal.prune(max_age=3600, max_records=10) == 2

    async def test_e36_what_acted_before_a_reboot_counts_by_the_shorter_clock(
        self, journal: Journal, clock: StubClock
    ) -> None:
        """The wall clock was a year ahead then, and has been put right."""
        await acted(journal)
        clock.step(-365 * 86400)
        clock.boot_id, clock.boot = "boot-2", 20.0
        assert await journal.prune(max_age=3600, max_records=0, horizon=60) == 0
        assert [act.id for act in await journal.acts("mend-file", 60)] == ["r1-0"]
        clock.boot = 61.0
        assert await journal.acts("mend-file", 60) == []

    async def test_counts(self, journal: Journal, clock: StubClock) -> None:
        await journal.accept([request("web-1"), request("web-2")], "r1")
        await journal.finish("r1-0", Phase.SKIPPED, "Cooldown", "no")
        counts = await journal.counts()
        assert counts.active == {("mend-file", Phase.PENDING): 1}
        assert counts.last == {("mend-file", Phase.SKIPPED): clock.now()}
