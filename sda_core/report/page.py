"""Render the page: one self-contained HTML file that makes no requests.

It has no scripts, fonts or external resources; style and charts are inline, images are ``data:`` URIs, and a content security
policy allows only these (the style sheet by its hash).  The template engine escapes every text from the data, and an undefined
name in the template is an error.  Equal data gives equal bytes: the page has no time stamp.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from sda_core.costs import Latest, Total, total
from sda_core.evaluation import is_clear
from sda_core.report.answer import Against, Answer, Choice, Power, Statement, Verdict, answer
from sda_core.report.model import (
    Change,
    Chart,
    Conflict,
    Count,
    DataCoverage,
    EncodedImage,
    Example,
    GateMap,
    Learning,
    ReportData,
    Result,
    Score,
    VectorMap,
)
from sda_core.report.plots import (
    heat_map,
    held_share,
    ladder_chart,
    line_chart,
    long_tail_chart,
    share_bar,
    swatch,
    vector_map,
)

_FOLDER = Path(__file__).parent
_EQUAL = 1e-12
_LEARNED = 0.05  # a smaller gain of retrieval may be due to the batch
_MORE_TARGETS = 3.0


# ------------------------------------------------------------------------------------------------ as text
def number(value: float) -> str:
    """A number with thousands separators; one decimal unless it is whole."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def percent(share: float) -> str:
    """``0.7291`` as "72.9 %"; values near 0 and 1 are not rounded to "0 %" and "100 %"."""
    if 0.0 < share < 0.0005:
        text = "< 0.1 %"
    elif 0.9995 <= share < 1.0:
        text = "> 99.9 %"
    else:
        text = "0 %" if share == 0.0 else "100 %" if share == 1.0 else f"{100 * share:.1f} %"
    return text.replace(" ", "\u00a0")


def small_percent(share: float) -> str:
    """A share with three significant digits, even if small: ``0.0000733`` as "0.00733 %"."""
    decimals = max(0, 2 - math.floor(math.log10(100 * share))) if share > 0.0 else 0
    digits = f"{100 * share:.{decimals}f}"
    return f"{digits.rstrip('0').rstrip('.') if decimals else digits}\u00a0%"


def day(seconds: int) -> str:
    """Seconds since 1970 as a day in UTC, or unchanged if outside of the calendar."""
    try:
        return (datetime.date(1970, 1, 1) + datetime.timedelta(days=seconds // 86_400)).isoformat()
    except OverflowError:
        return f"{seconds:,} s"


def duration(seconds: float) -> str:
    """``73.2`` as "1 min 13 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def p_text(p_value: float | None) -> str:
    """``p = 0.012``, ``p < 0.001``, or "" if none was computed."""
    if p_value is None:
        return ""
    text = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return text.replace(" ", "\u00a0")  # prevents a line break inside


def data_uri(image: EncodedImage) -> str:
    """An image as a ``data:`` URI."""
    return f"data:{image.media_type};base64,{base64.b64encode(image.data).decode('ascii')}"


def with_code(text: str) -> Markup:
    """A text with the parts between backticks as code."""
    parts = (f"<code>{escape(part)}</code>" if place % 2 else escape(part) for place, part in enumerate(text.split("`")))
    return Markup("").join(map(Markup, parts))


# -------------------------------------------------------------------------------------------- as table cells
@dataclass(frozen=True)
class ScoreCell:
    """A score's text and its interval's text."""

    value: str
    interval: str

    @property
    def text(self) -> str:
        """The score with its interval."""
        return f"{self.value} ({self.interval})" if self.interval else self.value


@dataclass(frozen=True)
class ChangeCell:
    """A change's text: an arrow, its meaning in a word, percent (or difference), p-value."""

    arrow: str
    word: str
    kind: str  # up, down or same: the cell's class; up and down only if the difference is clear
    amount: str
    p_value: str
    interval: str


@dataclass(frozen=True)
class Row:
    """A row of the result table; ``changes`` and ``tail_changes`` have one cell per baseline, None if there is no change.

    ``is_chosen`` marks the variant chosen on validation; the highest test result is not marked.
    """

    variant: str
    is_chosen: bool
    hit: ScoreCell
    ndcg: ScoreCell
    changes: tuple[ChangeCell | None, ...]
    tail_ndcg: ScoreCell | None
    tail_changes: tuple[ChangeCell | None, ...]


@dataclass(frozen=True)
class Block:
    """The rows of one recommender."""

    recommender: str
    rows: tuple[Row, ...]


def _score_cell(score: Score) -> ScoreCell:
    interval = "" if score.low is None or score.high is None else f"{score.low:.4f} to {score.high:.4f}"
    return ScoreCell(f"{score.value:.4f}", interval)


def change_cell(change: Change) -> ChangeCell:
    """The cell of a change: the arrow follows the sign; only a clear change has a colour."""
    if abs(change.difference) <= _EQUAL:
        arrow, word, kind = "=", "equal", "same"
    elif change.difference > 0:
        arrow, word, kind = "▲", "higher", "up"
    else:
        arrow, word, kind = "▼", "lower", "down"
    if not is_clear(change.low, change.high, change.p_value):
        kind = "same"
    amount = f"{change.difference:+.4f}" if change.relative is None else f"{100 * change.relative:+.1f}\u00a0%"
    interval = "" if change.low is None or change.high is None else f"{change.low:+.4f} to {change.high:+.4f}"
    return ChangeCell(arrow, word, kind, amount.replace("-", "−"), p_text(change.p_value), interval.replace("-", "−"))


def _by_baseline(changes: Sequence[Change], baselines: Sequence[str]) -> tuple[ChangeCell | None, ...]:
    found = {change.baseline: change_cell(change) for change in changes}
    return tuple(found.get(baseline) for baseline in baselines)


def headings(baselines: Sequence[str], cutoff: int, *, has_tail: bool) -> list[tuple[str, ...]]:
    """The headings of the result table, each as lines; the cells of a :class:`Row` have the same order."""
    ndcg = f"NDCG@{cutoff}"
    columns = [("Variant",), (f"Hit@{cutoff}",), (ndcg,), *(("NDCG", f"vs {baseline}") for baseline in baselines)]
    if has_tail:
        columns += [("Tail", ndcg), *(("Tail", f"vs {baseline}") for baseline in baselines)]
    return columns


def blocks(results: Sequence[Result], baselines: Sequence[str], chosen: Mapping[str, str]) -> list[Block]:
    """The result table: one block per recommender, in the order of the results.

    Args:
        results: results of all recommenders and variants.
        baselines: baselines of the changes.
        chosen: by recommender, the variant chosen on validation.
    """
    made: list[Block] = []
    for recommender in dict.fromkeys(result.recommender for result in results):
        own = [result for result in results if result.recommender == recommender]
        rows = [
            Row(
                variant=result.variant,
                is_chosen=chosen.get(recommender) == result.variant,
                hit=_score_cell(result.hit),
                ndcg=_score_cell(result.ndcg),
                changes=_by_baseline(result.changes, baselines),
                tail_ndcg=None if result.tail_ndcg is None else _score_cell(result.tail_ndcg),
                tail_changes=_by_baseline(result.tail_changes, baselines),
            )
            for result in own
        ]
        made.append(Block(recommender, tuple(rows)))
    return made


# --------------------------------------------------------------------------------------------------- parts
@dataclass(frozen=True)
class Card:
    """The choice for one recommender as text; ``against`` has its baselines with their cells.

    ``advised`` is the variant to use; if it is empty, ``doubt`` says why there is none.  ``validation`` has the NDCG@10 on
    validation targets that the choice is based on.
    """

    recommender: str
    advised: str
    doubt: str
    validation: str
    ndcg: str
    against: tuple[tuple[str, ChangeCell], ...]


def against_cell(found: Against) -> ChangeCell:
    """The cell of a difference: coloured and named if it is clear, else "no clear difference"."""
    cell = change_cell(found.change)
    kinds: dict[Verdict, str] = {"higher": "up", "lower": "down", "equal": "same", "no clear difference": "same"}
    arrow = "" if found.verdict == "no clear difference" else cell.arrow
    return replace(cell, kind=kinds[found.verdict], word=found.verdict, arrow=arrow)


def cards(found: Answer) -> list[Card]:
    """One card per recommender with a choice."""
    return [_card(choice) for choice in found.choices]


def _card(choice: Choice) -> Card:
    if choice.is_frozen_advised:
        assert choice.frozen is not None
        shown, pair = choice.frozen
        advised, against = shown.variant, (pair,)
        own = "" if shown.valid_ndcg is None else f"NDCG@10 on validation {shown.valid_ndcg:.4f}, "
        validation = f"{own}highest {choice.chosen.variant} {choice.valid:.4f}"
    else:
        shown, against = choice.chosen, choice.against
        advised = shown.variant if choice.is_advised else ""
        following = "" if choice.next_best is None else f", next {choice.next_best[0]} {choice.next_best[1]:.4f}"
        validation = f"Chosen on validation: {choice.valid:.4f}{following}"
    return Card(
        recommender=choice.recommender,
        advised=advised,
        doubt="" if choice.is_advised else _doubt(choice),
        validation=validation,
        ndcg=_score_cell(shown.ndcg).text,
        against=tuple((pair.change.baseline, against_cell(pair)) for pair in against),
    )


def _doubt(choice: Choice) -> str:
    begin = f"{choice.chosen.variant} is highest on validation, but"
    if choice.not_beaten:
        return f"{begin} not clearly better than {' or '.join(choice.not_beaten)}"
    worse = " and ".join(pair.change.baseline for pair in choice.against if pair.verdict == "lower")
    return f"{begin} clearly worse than {worse} on the test targets"


def power_lines(powers: Sequence[Power], cutoff: int) -> list[str]:
    """The power of each recommender, in one or two sentences."""
    made: list[str] = []
    for power in powers:
        cell, name = against_cell(power.oracle), power.recommender
        begin, interval = f"With perfect knowledge (variant oracle) {name}", f" ({cell.interval})" if cell.interval else ""
        if power.oracle.verdict == "higher":
            line = f"{begin} gains {cell.amount.lstrip('+')} NDCG@{cutoff} over ids{interval}."
            if power.smallest is not None:
                line += f" Differences smaller than about {percent(power.smallest)} cannot be detected here."
        elif power.oracle.verdict == "no clear difference":
            line = (
                f"{begin} shows no clear gain over ids{interval}. This run is too small to tell whether {name} can use good "
                "vectors, and so whether one variant is better than another there."
            )
        else:
            gain = "loses" if power.oracle.verdict == "lower" else "shows no gain"
            line = f"{begin} {gain} over ids{interval}. {name} cannot use good vectors here: its rows say nothing about vectors."
        made.append(line)
    return made


def statement_lines(statements: Sequence[Statement]) -> list[str]:
    """One line per variant and baseline: the recommenders with their results."""
    made: dict[tuple[str, str, str], list[str]] = {}
    for statement in statements:
        cell = against_cell(statement.against)
        verdict = statement.against.verdict
        key = statement.against.variant, verdict, statement.against.change.baseline
        interval = f", {cell.interval}" if cell.interval else ""
        made.setdefault(key, []).append(f"{statement.recommender} ({cell.amount}{interval})")
    words = {"higher": "is better than", "lower": "is worse than", "no clear difference": "against", "equal": "equals"}
    return [f"{variant} {words[verdict]} {baseline} in {'; '.join(of)}" for (variant, verdict, baseline), of in made.items()]


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its legend and its numbers as text."""

    title: str
    y_label: str
    svg: Markup
    legend: tuple[tuple[str, Markup], ...]
    numbers: tuple[tuple[str, str, str, str], ...]  # label, first, best with its x, last


def _figure(chart: Chart, colours: Mapping[str, int]) -> Figure:
    choose = min if chart.lower_is_better else max
    rows: list[tuple[str, str, str, str]] = []
    for curve in chart.curves:
        x, y = choose(curve.points, key=lambda point: point[1])
        rows.append((curve.label, f"{curve.points[0][1]:.4f}", f"{y:.4f} at {x:,.0f}", f"{curve.points[-1][1]:.4f}"))
    legend = tuple((curve.label, swatch(colours[curve.label])) for curve in chart.curves)
    return Figure(chart.title, chart.y_label, line_chart(chart, colours), legend, tuple(rows))


def _figures(charts: Sequence[Chart], colours: Mapping[str, int]) -> list[Figure]:
    drawn = [Chart(c.title, c.x_label, c.y_label, c.lower_is_better, tuple(v for v in c.curves if v.points)) for c in charts]
    return [_figure(chart, colours) for chart in drawn if chart.curves]


@dataclass(frozen=True)
class Learned:
    """A line of the table of the adapters' training; ``verdict`` is empty if there is nothing to report."""

    variant: str
    num_steps: int
    found: tuple[float, float]
    targets: tuple[str, str]
    cosines: tuple[str, str, str, str]
    verdict: str


def learned(row: Learning) -> Learned:
    """The diagnostics of an adapter's training, with a verdict if something looks wrong."""
    verdict = ""
    first, last = row.targets
    if row.collapsed:
        verdict = "its vectors have become alike: set the loss's center to batch, or lower the learning rate"
    elif last > row.batch_size / 2 and last > _MORE_TARGETS * first:
        verdict = "its teacher became nearly uniform, so the vectors become alike: set the loss's teacher_source to base"
    elif row.found[1] - row.found[0] < _LEARNED and row.found[1] < 1 - _LEARNED:
        verdict = "hardly anything was learned: use more steps, or a higher learning rate"
    images, texts = ((f"{before:.2f}", f"{after:.2f}") for before, after in (row.cosine_images, row.cosine_texts))
    return Learned(row.variant, row.num_steps, row.found, (f"{first:.1f}", f"{last:.1f}"), (*images, *texts), verdict)


def _ladders(results: Sequence[Result], cutoff: int, colours: Mapping[str, int]) -> list[tuple[str, Markup]]:
    drawn: list[tuple[str, Markup]] = []
    for recommender in dict.fromkeys(result.recommender for result in results):
        rows = [(result.variant, result.ndcg) for result in results if result.recommender == recommender]
        if len(rows) > 1:
            drawn.append((recommender, ladder_chart(f"{recommender}, NDCG@{cutoff} by variant", rows, colours)))
    return drawn


@dataclass(frozen=True)
class Bar:
    """A line of a table of counts or shares, with its bar."""

    label: str
    value: str
    share: str
    bar: Markup
    kind: str = ""  # the line's class


def funnel(coverage: DataCoverage) -> list[Bar]:
    """From the rows read, minus the rows dropped for each reason, to the rows kept; bars show remaining and dropped rows."""
    whole = max(coverage.rows_read, 1)
    left = coverage.rows_read
    made = [Bar("Rows read", number(left), percent(1.0), share_bar(1.0))]
    for drop in coverage.drops:
        left -= drop.value
        amount = f"\u2212{number(drop.value)}" if drop.value else "0"
        bar = share_bar(left / whole, drop.value / whole)
        made.append(Bar(drop.label, amount, percent(drop.value / whole), bar, "" if drop.value else "nothing"))
    kept = coverage.num_interactions
    made.append(Bar("Kept", number(kept), percent(kept / whole), share_bar(kept / whole), "total"))
    return made


def count_bars(counts: Sequence[Count]) -> list[Bar]:
    """Counts as bars, with shares of the total."""
    whole = max(sum(count.value for count in counts), 1)
    return [
        Bar(c.label, number(c.value), percent(c.value / whole), share_bar(c.value / whole), "" if c.value else "nothing")
        for c in counts
    ]


@dataclass(frozen=True)
class Tail:
    """The long-tail chart and its numbers: share of items, share of interactions."""

    svg: Markup
    numbers: tuple[tuple[str, str], ...]


def _long_tail(coverage: DataCoverage) -> Tail | None:
    points = coverage.long_tail
    if not points:
        return None
    rows = tuple((percent(share), percent(held_share(points, share))) for share in (0.01, 0.05, 0.1, 0.2, 0.5, 0.8))
    return Tail(long_tail_chart("Long tail of the training interactions", points), rows)


def _shared(example: Example) -> dict[str, set[int]]:
    """Per variant, the neighbours that are also neighbours under the first variant; empty for the first."""
    if not example.lists:
        return {}
    first = {neighbor.item.item_id for neighbor in example.lists[0].neighbors}
    return {
        found.variant: set() if index == 0 else first & {neighbor.item.item_id for neighbor in found.neighbors}
        for index, found in enumerate(example.lists)
    }


def size(num_bytes: int) -> str:
    """``1234567`` as "1.2 MB"."""
    value, unit = float(num_bytes), "B"
    for following in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, following
    return f"{value:.0f}\u00a0{unit}" if unit == "B" else f"{value:.1f}\u00a0{unit}"


def memory(mib: float) -> str:
    """``1638.4`` as "1.6 GiB"."""
    return f"{mib / 1024:.1f}\u00a0GiB" if mib >= 1024 else f"{mib:.0f}\u00a0MiB"


def _rate(speed: tuple[float, str] | None) -> str:
    if speed is None:
        return ""
    value, unit = speed
    return f"{value:,.0f} {unit}/s" if value >= 10 else f"{value:.2g} {unit}/s"


@dataclass(frozen=True)
class Spent:
    """A line of the cost table; a part ran inside the stage above it."""

    name: str
    variant: str
    is_part: bool
    seconds: float
    bar: Markup
    cpu_seconds: float
    memory: str
    speed: str


@dataclass(frozen=True)
class Spending:
    """The cost card: totals, main speeds, one line per stage, and the day of the last run."""

    total: Total
    speeds: tuple[tuple[str, str], ...]
    lines: tuple[Spent, ...]
    day: str


def spending(costs: Sequence[Latest]) -> Spending | None:
    """The cost card; None without costs."""
    if not costs:
        return None
    longest = max(row.run.seconds for row in costs) or 1.0
    lines = tuple(
        Spent(
            name=(row.run.recommender or "") if row.is_part else row.run.stage,
            variant="" if row.is_part else row.run.whose,
            is_part=row.is_part,
            seconds=row.run.seconds,
            bar=share_bar(row.run.seconds / longest),
            cpu_seconds=row.run.cpu_seconds,
            memory="" if row.run.largest_mib is None else memory(row.run.largest_mib),
            speed=_rate(row.run.speed),
        )
        for row in costs
    )
    speeds: list[tuple[str, str]] = []
    for stage, label in (("export_embeddings", "Item vectors"), ("evaluate", "Evaluation")):
        known = [
            row.run.speed for row in costs if row.run.stage == stage and row.run.variant != "id" and row.run.speed is not None
        ]
        if known:
            speeds.append((label, _rate(min(known))))  # of the slowest variant
    return Spending(total(costs), tuple(speeds), lines, max(row.run.ended for row in costs).date().isoformat())


def _maps(maps: Sequence[VectorMap], conflicts: Sequence[Conflict]) -> list[tuple[str, Markup]]:
    num_images = sum(conflict.alike_in == "image" for conflict in conflicts)
    return [
        (
            found.variant,
            vector_map(
                f"Map of {len(found.points)} items by their vectors under {found.variant}; {len(found.pairs)} pairs are marked",
                found.points, found.pairs, num_images,
            ),
        )
        for found in maps
    ]  # fmt: skip


def _heat_maps(gates: Sequence[GateMap]) -> list[tuple[str, str, Markup]]:
    """Variant, modality and chart, with experts as rows and blocks as columns."""
    drawn: list[tuple[str, str, Markup]] = []
    for gate in gates:
        for place, modality in enumerate(gate.modalities):
            num_experts = len(gate.mass[0][place])
            rows = [(f"expert {e + 1}", [block[place][e] for block in gate.mass]) for e in range(num_experts)]
            means = ", ".join(f"{label} {sum(values) / len(values):.2f}" for label, values in rows)
            title = f"Gate of {gate.variant} for {modality}, mean over the blocks: {means}"
            drawn.append((gate.variant, modality, heat_map(title, [str(block) for block in gate.blocks], rows, "block")))
    return drawn


def render(data: ReportData) -> str:
    """The page as HTML text.

    Args:
        data: the content of the page.

    Raises:
        jinja2.UndefinedError: the template uses a name that the data does not have, which is a bug.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=number,
        percent=percent,
        small_percent=small_percent,
        day=day,
        duration=duration,
        data_uri=data_uri,
        with_code=with_code,
        share_bar=share_bar,
        size=size,
        memory=memory,
        figure=lambda value: f"{value:.3g}".replace("-", "\u2212"),
        signed=lambda value: f"{value:+.2f}".replace("-", "\u2212"),
        minus=lambda value: f"{value:.3f}".replace("-", "\u2212"),
    )
    css = (_FOLDER / "style.css").read_text(encoding="utf-8")
    labels = dict.fromkeys(
        [variant.name for variant in data.variants]
        + [result.variant for result in data.results]
        + [curve.label for chart in (*data.validation_charts, *data.adapter_charts) for curve in chart.curves]
    )
    colours = {label: position for position, label in enumerate(labels)}
    baselines = list(
        dict.fromkeys(change.baseline for result in data.results for change in (*result.changes, *result.tail_changes))
    )
    first = next((variant.name for variant in data.variants if variant.name == "zero_shot"), None)
    if first in baselines:  # the method is compared with the unadapted model, so its column comes first
        baselines = [first, *(name for name in baselines if name != first)]
    found = answer(data.results, data.controls, data.trained, data.num_seeds, data.shop_users)
    has_tail = any(result.tail_ndcg is not None for result in data.results)
    return environment.get_template("template.html.j2").render(
        data=data,
        css=Markup(css),  # noqa: S704 (our own file)
        css_hash=base64.b64encode(hashlib.sha256(css.encode("utf-8")).digest()).decode("ascii"),
        blocks=blocks(data.results, baselines, {choice.recommender: choice.chosen.variant for choice in found.choices}),
        answer=found,
        powers=power_lines(found.powers, data.cutoff),
        cards=cards(found),
        shown=statement_lines(found.shown),
        undecided=statement_lines(found.undecided),
        has_tail=has_tail,
        headings=headings(baselines, data.cutoff, has_tail=has_tail),
        num_users=max((result.num_users for result in data.results), default=0),
        tail_num_users=max((result.tail_num_users for result in data.results), default=0),
        funnel=funnel(data.coverage),
        splits=count_bars(data.coverage.splits),
        images=count_bars(data.coverage.images),
        long_tail=_long_tail(data.coverage),
        ladders=_ladders(data.results, data.cutoff, colours),
        validation=_figures(data.validation_charts, colours),
        adapters=_figures(data.adapter_charts, colours),
        learning=[learned(row) for row in data.learning],
        maps=_maps(data.maps, data.conflicts),
        heat_maps=_heat_maps(data.gates),
        shared=[_shared(example) for example in data.examples],
        spent=spending(data.costs),
    )
