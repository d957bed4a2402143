"""`upkeep-exporter --check`: one collector's findings as a table for people, or as JSON.

For hosts without Prometheus. A collector may give a `report()` of its own; of any other the table
is made from its metrics: one row for each set of labels, one column for each metric.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TextIO, runtime_checkable

import msgspec
from prometheus_client.core import Metric

from exporter.logs import inert

_COLOURS = {"bad": "\x1b[31m", "warning": "\x1b[33m", "": ""}
_RESET = "\x1b[0m"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One finding."""

    cells: Mapping[str, str]
    """What the table shows, by column."""
    data: Mapping[str, Any]
    """What JSON shows."""
    level: str = ""
    """`bad` (red on a terminal), `warning` (yellow) or nothing."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The findings of one check."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Sentences below the table: what could not be read, and the like."""
    nothing: str = "nothing found"
    """What to say where there are no rows."""


@runtime_checkable
class Reporting(Protocol):
    """A collector that knows how to speak to people."""

    def report(self) -> Report:
        """Look, and say what there is. May take seconds."""


class Collecting(Protocol):
    """What every collector can do."""

    def collect(self) -> Iterable[Metric]:
        """The families of one scrape."""


def report_of(collector: Collecting) -> Report:
    """The collector's own report, else one made of its metrics."""
    if isinstance(collector, Reporting):
        return collector.report()
    return from_families(collector.collect())


def from_families(families: Iterable[Metric]) -> Report:
    """A table of metrics: a row for each label set, a column for each label and metric."""
    rows: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    labels: dict[str, None] = {}
    names: dict[str, None] = {}
    for family in families:
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            names[sample.name] = None
            labels.update(dict.fromkeys(sample.labels))
            rows.setdefault(key, dict(sample.labels))[sample.name] = sample.value
    columns = (*labels, *(name.removeprefix("upkeep_") for name in names))
    return Report(
        columns=columns,
        rows=tuple(
            Row(
                cells={
                    name.removeprefix("upkeep_"): value if isinstance(value, str) else f"{value:g}"
                    for name, value in data.items()
                },
                data=data,
            )
            for data in rows.values()
        ),
    )


def write(report: Report, output: str, stream: TextIO) -> None:
    """Print a report; output: `table` or `json`. Colours only where `stream` is a terminal."""
    if output == "json":
        json.dump({"findings": [r.data for r in report.rows], "notes": report.notes}, stream)
        stream.write("\n")
        return
    colours = stream.isatty() and not os.environ.get("NO_COLOR")
    if report.rows:
        _write_table(report, stream, colours=colours)
    else:
        stream.write(report.nothing + "\n")
    stream.writelines(f"note: {inert(note)}\n" for note in report.notes)


def _write_table(report: Report, stream: TextIO, *, colours: bool) -> None:
    lines = [[column.replace("_", " ").upper() for column in report.columns]]
    lines += [[inert(row.cells.get(c, "")) for c in report.columns] for row in report.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for index, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        colour = _COLOURS[report.rows[index - 1].level] if colours and index else ""
        stream.write(f"{colour}{text.rstrip()}{_RESET if colour else ''}\n")
