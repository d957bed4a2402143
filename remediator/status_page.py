"""The status page: what is under way, what was done, what was refused and why. Plain HTML.

Names and messages come from labels and API objects, that is from strangers: every value passes
`_text`, and the page's policy allows no script at all.
"""

import html
from collections.abc import Iterable, Sequence
from datetime import datetime

from exporter.logs import inert
from remediator.config import Config
from remediator.journal import Counts
from remediator.model import Phase, Remediation

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #1c2024; background: #fcfcfd; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #ddd;
  overflow-wrap: anywhere }
th { font-weight: 600; white-space: nowrap } td.t { white-space: nowrap }
.Failed { color: #b3261e; font-weight: 600 } .Succeeded { color: #1a7f37 }
.Skipped { color: #60646c }
.note { background: #fff3cd; padding: .6rem .8rem; border-radius: 4px }
@media (prefers-color-scheme: dark) {
  body { color: #e6e8eb; background: #151718 } th, td { border-color: #3a3f42 } a { color: #9ecbff }
  .note { background: #4a3b00 } .Failed { color: #ff9592 } .Succeeded { color: #71d083 }
  .Skipped { color: #9ba1a6 } }
"""


def _text(value: object) -> str:
    return html.escape(inert(str(value)), quote=True)


def _time(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> str:
    """Cells are HTML already; everything from outside went through `_text`."""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    if not body:
        return f"<p>{empty}</p>"
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _row(found: Remediation) -> list[str]:
    times = f" ({found.count} times)" if found.count > 1 else ""
    return [
        f'<a href="/?id={_text(found.id)}">{_text(found.id)}</a>',
        _text(_time(found.last_seen_at if found.count > 1 else found.created_at)),
        _text(found.fix),
        _text(found.target),
        f'<span class="{found.phase.value}">{found.phase.value}</span>',
        f"{_text(found.reason)}{times}",
        _text(found.message),
    ]


def status_page(
    *,
    title: str,
    dry_run: bool,
    config: Config,
    counts: Counts,
    active: Sequence[Remediation],
    recent: Sequence[Remediation],
    chosen: Remediation | None,
) -> str:
    """The whole page; `chosen` is the one whose steps are shown, where one was asked for.

    active: those that have not ended, apart from what is recent: refusals must not crowd them out.
    """
    ended = [r for r in recent if r.phase.terminal]
    waiting = sum(counts.active.values())
    head = ("Id", "Time (UTC)", "Fix", "Target", "Phase", "Reason", "Message")
    pauses = {pause.fix: pause for pause in counts.pauses}
    fixes = (
        [
            _text(name),
            "dry-run (whole daemon)" if dry_run else policy.mode.value,
            f'<span class="Failed">paused</span> by {_text(f"{pause.by}: {pause.why}")}'
            if (pause := pauses.get(name))
            else "no",
            _text(_time(counts.last.get((name, Phase.SUCCEEDED)))),
            _text(_time(counts.last.get((name, Phase.FAILED)))),
        ]
        for name, policy in sorted(config.fixes.items())
    )
    shown = "" if waiting <= len(active) else f", of which {len(active)} are shown"
    note = '<p class="note">Dry run: nothing is changed.</p>' if dry_run else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Upkeep on {_text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Upkeep remediator on {_text(title)}</h1>{note}"
        + (_details(chosen) if chosen else "")
        + "<h2>Fixes</h2>"
        + _table(("Fix", "Mode", "Paused", "Last success", "Last failure"), fixes, "None.")
        + f"<h2>Active ({waiting}{shown})</h2>"
        + _table(head, map(_row, active), "Nothing waits and nothing runs.")
        + "<h2>History</h2>"
        + _table(head, map(_row, ended), "Nothing yet.")
        + '<p><a href="/metrics">Metrics</a> · <a href="/api/v1/remediations">JSON</a></p>'
        "</body></html>\n"
    )


def _details(found: Remediation) -> str:
    steps = (
        [
            _text(_time(step.started_at)),
            _text(step.name),
            {True: "ok", False: '<span class="Failed">failed</span>', None: "under way"}[step.ok],
            f"{step.seconds:.1f} s" if step.seconds is not None else "",
            _text(step.message),
            _text(step.result),
        ]
        for step in found.steps
    )
    alerts = (
        [_text(a.name), _text(_time(a.starts_at)), "resolved" if a.resolved else "firing"]
        for a in found.alerts
    )
    return (
        f"<h2>{_text(found.fix)} of {_text(found.target)}</h2>"
        f'<p><span class="{found.phase.value}">{found.phase.value}</span>, {_text(found.reason)}: '
        f"{_text(found.message)}</p>"
        + _table(("Time (UTC)", "Step", "Outcome", "Took", "What", "Result"), steps, "No steps.")
        + _table(("Alert", "Since (UTC)", "State"), alerts, "")
    )
