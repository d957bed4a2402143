"""The policy: each rule, their order, and that every refusal names its rule and its end."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from remediator import policy
from remediator.config import FixPolicy, Mode, OptOut, Seconds
from remediator.journal import Act, Instant, Pause
from remediator.model import Condition, Decision, Origin, Phase, Remediation, Target, Verdict
from remediator.windows import Window
from tests.engine.support import STARTED

TARGET = Target(node="n1", namespace="shop", pod="web-1", container="app")
BROKEN = Condition(broken=True, reason="Zombies", message="7 zombies", plan=("reap them",))
NOW = Instant(wall=STARTED.timestamp(), boot_id="boot-1", boottime=100_000.0)
RULES = FixPolicy(cooldown=Seconds(600), max_acts=3, window=Seconds(3600))


def remediation(**changes: Any) -> Remediation:
    made = Remediation(
        id="r1-0",
        fix="reap-zombies",
        target=TARGET,
        origin=Origin.ALERT,
        phase=Phase.PENDING,
        reason="",
        message="",
        created_at=STARTED,
        last_seen_at=STARTED,
    )
    return msgspec.structs.replace(made, **changes)


def facts(**changes: Any) -> policy.Facts:
    made = policy.Facts(policy=RULES, opt_out=OptOut(), dry_run=False, now=NOW, pause=None)
    return msgspec.structs.replace(made, **changes)


def ago(seconds: float, *, boot_id: str = "boot-1", wall_error: float = 0.0) -> Instant:
    """An instant so long before NOW, with the wall clock of then wrong by so much."""
    return Instant(
        wall=NOW.wall - seconds + wall_error, boot_id=boot_id, boottime=NOW.boottime - seconds
    )


def act(at: Instant, target: Target = TARGET, **changes: Any) -> Act:
    made = Act(
        id="old-0",
        target=target,
        phase=Phase.SUCCEEDED,
        reason="Reaped",
        workload="",
        at=at,
        admitted=at,
        counted=True,
    )
    return msgspec.structs.replace(made, **changes)


def decide(
    given: Remediation | None = None, condition: Condition = BROKEN, **changes: Any
) -> Decision:
    given, known = given or remediation(), facts(**changes)
    return policy.before_check(given, known) or policy.after_check(given, condition, known)


def test_broken_and_nothing_against_it_is_admitted() -> None:
    assert decide().verdict is Verdict.ADMIT


def test_e7_a_healthy_target_is_left_alone() -> None:
    healthy = Condition(broken=False, reason="ConditionCleared", message="no zombies")
    found = decide(condition=healthy)
    assert (found.verdict, found.reason) == (Verdict.REFUSE, "ConditionCleared")


@pytest.mark.parametrize(
    "opt_out",
    [
        OptOut(nodes=("n1",)),
        OptOut(namespaces=("sh*",)),
        OptOut(pods=("shop/web-*",)),
    ],
)
def test_the_local_list_needs_no_look_at_the_target(opt_out: OptOut) -> None:
    found = policy.before_check(remediation(), facts(opt_out=opt_out))
    assert found is not None
    assert found.reason == "OptedOut"
    assert "opt_out." in found.message
    by_hand = policy.before_check(remediation(origin=Origin.HAND), facts(opt_out=opt_out))
    assert by_hand is not None


def test_a_pattern_is_no_regular_expression() -> None:
    assert policy.before_check(remediation(), facts(opt_out=OptOut(nodes=("n.",)))) is None


def test_an_annotation_forbids_whatever_else_says() -> None:
    marked = msgspec.structs.replace(BROKEN, opted_out="the namespace's annotation says disabled")
    assert decide(condition=marked).reason == "OptedOut"
    assert decide(remediation(origin=Origin.HAND), marked).reason == "OptedOut"


def test_paused_names_who_and_how_to_resume() -> None:
    pause = Pause(fix="reap-zombies", since=STARTED, by="ada", why="looking", reason="Paused")
    found = decide(pause=pause)
    assert found.reason == "Paused"
    assert "ada" in found.message
    assert "upkeep-remediator resume reap-zombies" in found.message
    assert decide(remediation(origin=Origin.HAND), pause=pause).verdict is Verdict.ADMIT


def test_cooldown_of_the_target_and_of_its_workload() -> None:
    elsewhere = msgspec.structs.replace(TARGET, pod="web-2")
    kin = msgspec.structs.replace(BROKEN, workload="deployment/shop/web")
    assert decide(acts=[act(ago(599))]).reason == "Cooldown"
    assert decide(acts=[act(ago(600))]).verdict is Verdict.ADMIT
    assert decide(acts=[act(ago(10), elsewhere)]).verdict is Verdict.ADMIT
    same = act(ago(10), elsewhere, workload="deployment/shop/web")
    assert decide(condition=kin, acts=[same]).reason == "Cooldown"
    failed = act(ago(10), phase=Phase.FAILED)
    assert decide(acts=[failed]).reason == "Cooldown"


@pytest.mark.parametrize("phase", [Phase.ADMITTED, Phase.RUNNING])
def test_e37_what_is_under_way_at_the_workload_holds_its_other_pods(phase: Phase) -> None:
    elsewhere = msgspec.structs.replace(TARGET, pod="web-2")
    kin = msgspec.structs.replace(BROKEN, workload="deployment/shop/web")
    same = act(ago(10), elsewhere, workload="deployment/shop/web", phase=phase)
    found = decide(condition=kin, acts=[same])
    assert (found.verdict, found.reason) == (Verdict.REFUSE, "Cooldown")
    assert "begins when that has ended" in found.message
    assert "old-0" in found.message
    other = msgspec.structs.replace(same, workload="deployment/shop/api")
    assert decide(condition=kin, acts=[other]).verdict is Verdict.ADMIT
    unknown = msgspec.structs.replace(same, workload="")
    assert decide(acts=[unknown]).verdict is Verdict.ADMIT


def test_e17_a_refusal_says_which_rule_and_until_when() -> None:
    found = decide(acts=[act(ago(100))])
    assert found.until == STARTED + timedelta(seconds=500)
    assert "cooldown of 10 m" in found.message
    assert "2026-01-02 03:12:25 UTC" in found.message
    for changes, words in (
        ({"acts": [act(ago(10), Target(node=f"n{i}")) for i in range(3)]}, ("max_acts", "resume")),
        ({"opt_out": OptOut(nodes=("n1",))}, ("opt_out.nodes",)),
        ({"policy": FixPolicy(mode=Mode.OFF)}, ("off",)),
    ):
        said = decide(**changes)
        assert said.verdict is Verdict.REFUSE
        assert all(word in said.message for word in words), said.message


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_e12_a_step_of_the_wall_clock_moves_no_cooldown(step: float) -> None:
    """Within one boot the boot clock counts: neither step ends or extends it."""
    stepped = [act(ago(100, wall_error=-step))]
    found = decide(acts=stepped)
    assert found.reason == "Cooldown"
    assert found.until == STARTED + timedelta(seconds=500)
    assert decide(acts=[act(ago(601, wall_error=-step))]).verdict is Verdict.ADMIT


def test_e12_after_a_reboot_a_future_act_holds_no_longer_than_its_cooldown() -> None:
    future = act(ago(0, boot_id="boot-0", wall_error=86400))
    for uptime in (0, 100, 599):
        booted = Instant(wall=NOW.wall, boot_id="boot-1", boottime=uptime)
        found = decide(acts=[future], now=booted)
        assert found.until == STARTED + timedelta(seconds=600 - uptime)
    later = Instant(wall=NOW.wall, boot_id="boot-1", boottime=600)
    assert decide(acts=[future], now=later).verdict is Verdict.ADMIT


def test_e6_a_storm_opens_the_breaker() -> None:
    others = [act(ago(60 * i), Target(node=f"n{i}")) for i in range(1, 4)]
    assert decide(acts=others).reason == "StormBreaker"
    assert decide(acts=others[:2]).verdict is Verdict.ADMIT
    running = [act(ago(1), Target(node="n9"), phase=Phase.ADMITTED), *others[:2]]
    assert decide(acts=running).reason == "StormBreaker"
    forgiven = [msgspec.structs.replace(a, counted=False) for a in others]
    assert decide(acts=forgiven).verdict is Verdict.ADMIT
    old = [act(ago(3600), Target(node=f"n{i}")) for i in range(3)]
    assert decide(acts=old).verdict is Verdict.ADMIT


def test_dry_run_says_what_it_would_do_only_where_it_would() -> None:
    for found in (decide(dry_run=True), decide(policy=FixPolicy(mode=Mode.DRY_RUN))):
        assert (found.verdict, found.reason) == (Verdict.REFUSE, "DryRun")
        assert "reap them" in found.message
    assert decide(dry_run=True, acts=[act(ago(1))]).reason == "Cooldown"
    assert decide(remediation(origin=Origin.HAND), dry_run=True).reason == "DryRun"


def test_approval_waits_and_then_admits() -> None:
    approval = FixPolicy(mode=Mode.APPROVAL)
    found = decide(policy=approval)
    assert (found.verdict, found.reason) == (Verdict.WAIT, "NeedsApproval")
    assert "approve r1-0" in found.message
    assert decide(remediation(approved_by="ada"), policy=approval).verdict is Verdict.ADMIT


def test_outside_the_window_waits_until_it_opens() -> None:
    night = FixPolicy(maintenance_windows=(Window(start="22:00", end="04:00"),))
    assert decide(policy=night).verdict is Verdict.ADMIT  # 03:04
    noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    found = decide(policy=night, now=Instant(wall=noon.timestamp(), boot_id="b", boottime=0.0))
    assert (found.verdict, found.reason) == (Verdict.WAIT, "OutsideWindow")
    assert found.until == datetime(2026, 1, 2, 22, tzinfo=UTC)


def test_what_waited_too_long_is_given_up() -> None:
    waiting = remediation(expires_at=STARTED + timedelta(days=1), reason="NeedsApproval")
    assert policy.expired(waiting, STARTED + timedelta(hours=23)) is None
    found = policy.expired(waiting, STARTED + timedelta(days=1))
    assert found is not None
    assert (found.reason, "1 d" in found.message) == ("Expired", True)


def test_what_was_approved_in_time_waits_for_its_window_however_long() -> None:
    approved = remediation(
        expires_at=STARTED + timedelta(days=1), reason="OutsideWindow", approved_by="ada"
    )
    assert policy.expired(approved, STARTED + timedelta(days=6)) is None


def test_a_failed_rotation_pauses_the_fix() -> None:
    strict = FixPolicy(pause_after_failure=True)
    assert policy.pauses_after(remediation(), Phase.FAILED, strict)
    assert not policy.pauses_after(remediation(), Phase.SKIPPED, strict)
    assert not policy.pauses_after(remediation(), Phase.FAILED, FixPolicy())


def test_every_refusal_of_the_engine_is_a_known_label_value() -> None:
    assert {"Cooldown", "StormBreaker", "OptedOut", "DryRun", "Expired"} <= set(policy.REFUSALS)
