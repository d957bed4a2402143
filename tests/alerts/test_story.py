"""Events and the demo's table: what a person is shown follows from what the pages said."""

import pytest

from deploy.local import events
from deploy.local.events import Event, Events
from deploy.local.observe import Alert, Remediation
from deploy.local.story import Course, table


def alert(name: str, fix: str = "", *, node: str = "n", state: str = "firing") -> Alert:
    labels = {"alertname": name, "remediation": fix, "node": node}
    return Alert(tuple(sorted(labels.items())), state, f"{name} on {node}")


def record(phase: str, *, count: int = 1, reason: str = "Why", identity: str = "1") -> Remediation:
    return Remediation(identity, "reap-zombies", "shop/web app", phase, reason, "Said.", (), count)


class Pages:
    """What Prometheus and the remediator answer, set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alerts: list[Alert] = []
        self.records: list[Remediation] = []
        monkeypatch.setattr(events, "alerts", lambda _url: self.alerts)
        monkeypatch.setattr(events, "remediations", lambda _url, _token: self.records)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Pages:
    return Pages(monkeypatch)


def lines(seen: Events) -> list[str]:
    return [f"{event.kind} {event.text}" for event in seen.new()]


def test_an_alert_is_told_when_it_begins_to_fire_and_when_it_is_over(pages: Pages) -> None:
    seen = Events("p", "r")
    pages.alerts = [alert("A", state="pending")]
    assert lines(seen) == []
    pages.alerts = [alert("A")]
    assert lines(seen) == ["firing A: A on n"]
    assert lines(seen) == []
    pages.alerts = []
    assert lines(seen) == ["resolved A: A on n"]


def test_many_of_one_name_are_one_line(pages: Pages) -> None:
    seen = Events("p", "r")
    pages.alerts = [alert("A", node="n1"), alert("A", node="n2"), alert("B")]
    assert lines(seen) == ["firing A: A on n1 (and 1 more)", "firing B: B on n"]


def test_a_remediation_is_told_at_each_phase_and_each_repeated_refusal(pages: Pages) -> None:
    seen = Events("p", "r")
    pages.records = [record("Pending", reason="")]
    assert lines(seen) == ["Pending reap-zombies on shop/web app. Said"]
    pages.records = [record("Skipped", reason="Cooldown")]
    assert lines(seen) == ["Skipped reap-zombies on shop/web app. Cooldown: Said"]
    pages.records = [record("Skipped", reason="Cooldown", count=2)]
    assert lines(seen) == ["Skipped reap-zombies on shop/web app. Cooldown, 2 times now"]


def course() -> Course:
    return Course("zombies", "reap-zombies", "60 zombies", broken=100.0)


def test_a_course_is_done_when_it_is_healed_and_its_alerts_are_over() -> None:
    told = course()
    told.see(Event("firing", "", alerts=(alert("A", "reap-zombies"),)), 110)
    told.see(Event("firing", "", alerts=(alert("B", "reap-zombies"),)), 111)
    told.see(Event("Pending", "", record=record("Pending")), 112)
    told.see(Event("resolved", "", alerts=(alert("A", "reap-zombies"),)), 120)
    assert told.clear is None
    told.see(Event("Succeeded", "", record=record("Succeeded")), 121)
    before = told.done
    told.see(Event("resolved", "", alerts=(alert("B", "reap-zombies"),)), 122)
    assert (before, told.done) == (False, True)
    assert told.row(130) == (
        "zombies",
        "yes",
        "after 10 s",
        "after 12 s",
        "after 21 s",
        "after 22 s",
    )
    assert told.record == "1"


def test_alerts_of_others_and_other_fixes_are_not_its_own() -> None:
    told = course()
    told.see(Event("firing", "", alerts=(alert("A", "unstick-rollout"), alert("B"))), 110)
    assert told.fired is None


def test_an_alert_that_comes_back_is_not_over() -> None:
    told = course()
    told.see(Event("Succeeded", "", record=record("Succeeded")), 110)
    told.see(Event("firing", "", alerts=(alert("A", "reap-zombies"),)), 111)
    told.see(Event("resolved", "", alerts=(alert("A", "reap-zombies"),)), 112)
    told.see(Event("firing", "", alerts=(alert("A", "reap-zombies"),)), 113)
    assert not told.done


def test_a_skipped_or_failed_remediation_does_not_count_as_healed() -> None:
    for phase in ("Skipped", "Failed"):
        told = course()
        told.see(Event(phase, "", record=record(phase)), 110)
        assert told.healed is None
        assert told.decision == f"{phase} (Why) Said."


def test_the_table_stands_in_columns() -> None:
    shown = table([course().row(130), ("x", "", "", "", "", "")])
    assert shown[0].startswith("condition  broken")
    assert shown[2].startswith("zombies      30 s ago  …")
