"""The settings of `unstick-rollout` as the remediator's file gives them."""

import pytest

from exporter.yaml_source import ConfigError, Source
from remediator.config import parse
from remediator.fixes import settings_types
from remediator.fixes.rollouts import Settings


def read(line: str) -> Settings:
    text = f"fixes:\n  unstick-rollout:\n    settings:\n      {line}\n"
    _, settings = parse(Source(text, "here.yml"), settings_types())
    found: Settings = settings["unstick-rollout"]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "min_stuck: -5",
        "settle: -1",
        "poll: 0",
        "undo_timeout: 0",
        "deadline: 0",
        "deadline: 150",
        "come_up_timeout: 10",
        "extra_unavailable: -1",
        "most_restarts: 0",
        "come_up_timeout: soon",
        "come_up_timeouts: 10",
    ],
)
def test_what_could_not_work_is_refused_by_its_line(line: str) -> None:
    with pytest.raises(ConfigError, match=r"here\.yml.*"):
        read(line)


def test_spans_of_time_are_read_as_everywhere_in_the_file() -> None:
    assert read("come_up_timeout: 5m").come_up_timeout == 300.0
    assert read("poll: 0.5").poll == 0.5
    assert read("min_stuck: 0").min_stuck == 0.0
