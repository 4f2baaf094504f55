"""How a view of a cluster looks in a terminal: tables, bars and sparklines. Pure: a view in, rich renderables out.

Every shape can be read without colour: what is piped into a file says as much as the screen does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from baton.doctor_judgement import Finding
from baton.status_judgement import held_share
from router.cluster_view import ClusterView, PairView, TierView, WorkerView
from router.recent import Spread

BAR_CELLS = 24
MAX_PAIRS = 16  # rows; those in trouble and those in use come first
PAGES = (  # state, how a cell of it looks, its colour: in the order of the bar
    ("owned", "█", "green"),
    ("leased", "▓", "yellow"),
    ("quarantined", "▒", "red"),
    ("cached", "░", "blue"),
    ("free", "·", "bright_black"),
)
SPARKS = "▁▂▃▄▅▆▇█"
STATE_STYLES = {"ready": "green", "starting": "cyan", "draining": "yellow", "unreachable": "red", "missing": "red"}


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    body: RenderableType


def page(view: ClusterView, findings: Sequence[Finding], where: str) -> Group:
    """What `baton status` prints."""
    parts: list[RenderableType] = [head(view, findings, where)]
    for section in sections(view):
        parts += [Text(), Text(section.title, style="bold"), section.body]
    return Group(*parts, Text(), verdict(findings))


def screen(view: ClusterView, findings: Sequence[Finding], where: str, trouble: str = "") -> Group:
    """What `baton top` shows. `trouble`: why the view is not of now."""
    panels = [Panel(section.body, title=section.title, title_align="left", box=ROUNDED) for section in sections(view)]
    foot = Text(trouble, style="bold red") if trouble else Text("q ends", style="dim")
    return Group(head(view, findings, where), *panels, verdict(findings), foot)


def head(view: ClusterView, findings: Sequence[Finding], where: str) -> Text:
    wrong = sum(finding.wrong for finding in findings)
    text = Text.assemble((view.model, "bold"), f" at {where}, baton {view.baton_version}: ")
    said = f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong" if wrong else "all is well"
    return text.append(said, style="bold red" if wrong else "bold green")


def sections(view: ClusterView) -> list[Section]:
    found = [
        Section("Routers", _routers(view)),
        Section("Tiers", _tiers(view.tiers)),
        Section("Workers", Group(_workers(view.workers), _legend())),
    ]
    if view.handoffs:
        found.append(Section("Hand-offs", _pairs(view.handoffs)))
    return [*found, Section("Latency, of what this router served", _latency(view))]


def verdict(findings: Sequence[Finding]) -> RenderableType:
    """What is wrong, then hints; each with what to do next."""
    if not findings:
        return Text("nothing is wrong", style="green")
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    for finding in findings:
        mark = Text("WRONG", style="bold red") if finding.wrong else Text("hint", style="cyan")
        subject = f"{', '.join(finding.where)}: " if finding.where else ""
        rows.add_row(mark, Text.assemble(subject + finding.what, "\n", (finding.advice, "dim")))
    return rows


# --- the sections ----------------------------------------------------------------------------------------------


def _routers(view: ClusterView) -> RenderableType:
    rows = _table("NAME", "ADDRESS", ">IN FLIGHT", ">PROMPT TOKENS WAITING")
    for router in view.routers:
        numbers = (str(router.inflight_requests), str(router.queued_prompt_tokens)) if router.answers else ("-", "-")
        _add(rows, router.name, router.url or ("this one" if router.answers else "-"), *numbers)
    return Group(rows, Text(f"registry: {_registry(view)}"))


def _registry(view: ClusterView) -> str:
    if view.registry is None:
        return "none; this router was told its workers"
    age = "never read" if view.registry.age_s is None else f"read {view.registry.age_s:.1f} s ago"
    return f"{'up' if view.registry.up else 'AWAY'}, {age}"


def _tiers(tiers: Iterable[TierView]) -> Table:
    rows = _table("TIER", ">DESIRED", ">READY", ">STARTING", ">DRAINING", ">GONE", "LAST DECISION")
    for tier in tiers:
        short = tier.desired is not None and tier.ready < tier.desired
        _add(
            rows,
            tier.tier,
            "-" if tier.desired is None else str(tier.desired),
            Text(str(tier.ready), style="red" if short or not tier.ready else "green"),
            *(_count(number) for number in (tier.starting, tier.draining, tier.gone)),
            Text(tier.reason or "-"),
        )
    return rows


def _workers(workers: Iterable[WorkerView]) -> Table:
    rows = _table("NAME", "TIER", "STATE", ">RUNNING", ">WAITING", ">TOKENS", ">HAND-OFFS", ">STEP", "PAGES", ">HELD")
    for worker in workers:
        _add(
            rows,
            worker.name,
            worker.tier or "-",
            Text(worker.state, style=STATE_STYLES.get(worker.state, "")),
            str(worker.running_requests),
            str(worker.waiting_requests),
            f"{worker.waiting_tokens:,}",
            str(sum(worker.handoffs.values())),
            seconds(worker.step_s or None),
            bar(worker.pages),
            f"{held_share(worker):.0%} of {sum(worker.pages.values()):,}" if worker.pages else "-",
        )
    return rows


def _pairs(pairs: Sequence[PairView]) -> Group:
    """Loans, from decode to prefill workers, only where they are in use or in trouble."""
    shown = [pair for pair in pairs if pair.needed or pair.transport or pair.trouble]
    shown.sort(key=lambda pair: (not pair.trouble, -pair.requests, not pair.transport))
    rows = _table("FROM", "TO", "PATH", ">BANDWIDTH", ">PAGE", ">REQUESTS", "")
    for pair in shown[:MAX_PAIRS]:
        rate, latency = f"{pair.bytes_per_s / 1e9:.2f} GB/s", seconds(pair.latency_s)
        numbers = (pair.transport, rate, latency) if pair.transport else (_no_path(pair), "-", "-")
        note = Text(pair.trouble, style="red") if pair.trouble else Text("" if pair.needed else "loans")
        _add(rows, pair.source, pair.receiver, *numbers, str(pair.requests) if pair.needed else "-", note)
    left = len(shown) - MAX_PAIRS
    more = [Text(f"and {left} more; `baton doctor transport` shows all", style="dim")] if left > 0 else []
    return Group(rows, *more)


def _no_path(pair: PairView) -> str:
    return "none" if pair.trouble else "not used yet"


def _latency(view: ClusterView) -> Table:
    steps = len(view.first_token.history_p90_s)
    span = f"P90, LAST {steps * view.first_token.history_step_s:.0f} s" if steps else ""
    rows = _table("", ">P50", ">P90", ">P99", "OVER", span)
    for name, spread, what in (("TTFT", view.first_token, "requests"), ("ITL", view.token_gap, "tokens")):
        numbers = (seconds(spread.p50_s), seconds(spread.p90_s), seconds(spread.p99_s))
        over = f"{spread.observed:,} {what} in {spread.window_s:.0f} s"
        _add(rows, name, *numbers, over, Text(sparkline(spread), style="cyan"))
    return rows


# --- the shapes ------------------------------------------------------------------------------------------------


def bar(pages: dict[str, int], cells: int = BAR_CELLS) -> Text:
    """The pool by the state of its pages. A state that has any pages has at least one cell."""
    total = sum(pages.get(state, 0) for state, _, _ in PAGES)
    text = Text()
    if not total:
        return text
    lengths = _lengths([pages.get(state, 0) for state, _, _ in PAGES], cells)
    for (_, shape, style), length in zip(PAGES, lengths, strict=True):
        text.append(shape * length, style=style)
    return text


def _lengths(counts: Sequence[int], cells: int) -> list[int]:
    """Whole cells that add up; what rounding takes or gives is that of the longest part."""
    total = sum(counts)
    lengths = [max(1, round(cells * count / total)) if count else 0 for count in counts]
    lengths[lengths.index(max(lengths))] += cells - sum(lengths)
    return lengths


def _legend() -> Text:
    text = Text("pages: ")
    for state, shape, style in PAGES:
        text.append(shape, style=style).append(f" {state}  ")
    return text


def sparkline(spread: Spread) -> str:
    """One character for each step, as high as its share of the highest; a dot where nothing was observed."""
    known = [value for value in spread.history_p90_s if value is not None]
    top = max(known, default=0.0) or 1.0
    return "".join(
        "·" if value is None else SPARKS[round((len(SPARKS) - 1) * value / top)] for value in spread.history_p90_s
    )


def seconds(value_s: float | None) -> str:
    """Three digits, in the unit that suits it."""
    if value_s is None:
        return "-"
    if value_s >= 1.0:
        return f"{value_s:.2f} s" if value_s < 10 else f"{value_s:.0f} s"
    if value_s >= 0.001:
        return f"{value_s * 1e3:.1f} ms" if value_s < 0.01 else f"{value_s * 1e3:.0f} ms"
    return f"{value_s * 1e6:.0f} us"


def _count(number: int) -> str:
    return str(number) if number else "-"


def _add(rows: Table, *cells: str | Text) -> None:
    """What comes from the cluster is text, never markup."""
    rows.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _table(*columns: str) -> Table:
    """Without lines. A column whose name begins with > is of numbers."""
    rows = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        is_number = column.startswith(">")
        rows.add_column(column.removeprefix(">"), justify="right" if is_number else "left", overflow="fold")
    return rows
