"""The page: self-contained, harmless, equal twice, and true to its data."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from sda_core.costs import Latest
from sda_core.report import ReportData, render
from sda_core.report.model import Change, Learning, NeighborList
from sda_core.report.page import (
    change_cell,
    day,
    duration,
    funnel,
    learned,
    memory,
    number,
    p_text,
    percent,
    small_percent,
    with_code,
)

VOID = {"meta", "img", "br", "link", "input", "hr"}
SVG_EMPTY = {"line", "circle", "rect", "polygon", "polyline"}


class Outline(HTMLParser):
    """Tags, attributes and text of a page; fails where tags are not nested."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_EMPTY | VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def without_images(html: str) -> str:
    return re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "data:", html)


def visible(html: str) -> str:
    outline = Outline(html)
    return " ".join(" ".join(text for tag, text in outline.texts if tag not in ("style", "title")).replace("\u00a0", " ").split())


def test_equal_bytes_twice(page_data: ReportData) -> None:
    assert render(page_data) == render(dataclasses.replace(page_data))


def test_it_asks_nobody_for_anything(page_data: ReportData) -> None:
    html = without_images(render(page_data))
    for word in ("http:", "https:", "//", "@import", "url(", "<link", "<iframe", "<object", "<embed", "srcset", "javascript:"):
        assert word not in html.lower(), word
    outline = Outline(html)
    for tag, attributes in outline.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "action", "data", "poster"):
                assert value is not None
                assert value.startswith(("data:", "#")), (tag, name, value)
    assert not outline.named("script")


def test_policy_allows_just_the_inline_style_and_data_images(page_data: ReportData) -> None:
    html = render(page_data)
    policy = next(meta["content"] for meta in Outline(html).named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not [attributes for _, attributes in Outline(html).tags if "style" in attributes]  # the policy would drop them


def test_texts_from_the_data_are_text(page_data: ReportData) -> None:
    html = render(page_data)
    assert "<script" not in html.lower()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    outline = Outline(html)
    assert {attributes.get("src", "")[:11] for attributes in outline.named("img")} == {"data:image/"}  # type: ignore[index]
    shown = [text.strip() for _, text in outline.texts if "alert(1)" in text]
    assert len(shown) >= 4  # title, heading, set-up, example
    assert page_data.title in shown
    assert page_data.title in {attributes["alt"] for attributes in outline.named("img")}


def test_names_of_variants_and_recommenders_are_escaped_in_charts_and_tables(page_data: ReportData) -> None:
    nasty = '"><script>alert(3)</script>'
    results = tuple(dataclasses.replace(r, variant=nasty + r.variant, recommender=nasty) for r in page_data.results)
    charts = tuple(
        dataclasses.replace(chart, title=nasty, curves=tuple(dataclasses.replace(c, label=nasty + c.label) for c in chart.curves))
        for chart in page_data.validation_charts
    )
    html = render(dataclasses.replace(page_data, results=results, validation_charts=charts, tail_definition=nasty, ties=nasty))
    assert "<script" not in html.lower()
    assert not Outline(html).named("script")


def test_headings_landmarks_and_tables(page_data: ReportData) -> None:
    outline = Outline(render(page_data))
    assert outline.named("html")[0]["lang"] == "en"
    assert len(outline.named("h1")) == 1
    assert len(outline.named("main")) == 1
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))  # no level is skipped
    assert all("scope" in attributes for attributes in outline.named("th"))
    assert all(attributes.get("alt") for attributes in outline.named("img"))
    assert all("aria-label" in a or a.get("aria-hidden") == "true" for a in outline.named("svg"))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in outline.named("a"):
        assert str(link["href"]).removeprefix("#") in ids
    for _, attributes in outline.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            if name in attributes:
                assert attributes[name] in ids
    for attributes in (a for tag, a in outline.tags if a.get("class") == "scroll"):
        assert attributes.get("tabindex") == "0"  # what scrolls can be reached with the keyboard
        assert attributes.get("aria-label")


def test_numbers_are_on_the_page(page_data: ReportData) -> None:
    text = visible(render(page_data))
    for expected in (
        "Simulated shop.", "The backbone has random weights.", "1,200 test users, 90 of them with a tail target",
        "0.0500", "0.0460 to 0.0550", "+4.2 %", "p < 0.001", "−2.0 %", "p = 0.610",
        "1 of 3 shared",
        "Which vectors should I use? No positive control.",
        "sasrec no clear choice sda is highest on validation, but not clearly better than id against id:",
            "against id: no clear difference, −2.0 % (−0.0040 to +0.0020) ▲ +4.2 %",
        "▲ +4.2 % against zero_shot, higher (+0.0010",
        "Test NDCG@10 0.0500 (0.0460 to 0.0550). Chosen on validation: 0.0630, next id 0.0610.",
        "sda is better than zero_shot in sasrec (+4.2 %, +0.0010 to +0.0030).",
        "sda against id in sasrec (−2.0 %, −0.0040 to +0.0020).",
        "Every number of a trained recommender is the mean of 3 training seeds; pop and nearest draw no random numbers.",
        "1.810 −1.770 −1.750 0.7 %",
        "zero_shot 90.0 % 80.0 % 77.0 % 12.1 % 0 %", "289 items with an image and a category, among 300",
        "Chance: 12.0 % for the category, 0.3 % for the item itself.", "sda costs", "costs/report.html",
        "images +0.91, texts −0.24", "together: zero_shot +0.47, sda +0.12",
        "The largest difference between two modalities in any layer is 0.700.",
        "sweep-temperature", "3 more rows", "cannot be read as a table", "1.2 MB",
        "0.900", "(no title)", "no image",
    ):  # fmt: skip
        assert expected in text, expected


def table_of(html: str, heading: str) -> list[list[str]]:
    """Texts of the body cells of the table under a heading, row by row."""
    found = re.search(rf'<table [^>]*aria-labelledby="{heading}".*?</table>', html, re.DOTALL)
    assert found is not None
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", found.group(0), re.DOTALL)
    return [[visible(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows[1:]]


def test_rows_read_minus_the_reasons_are_the_rows_kept(page_data: ReportData) -> None:
    html = render(page_data)
    rows = table_of(html, "data-funnel")
    assert rows[0] == ["Rows read", "12,345", "100 %"]
    assert rows[-1] == ["Kept", "9,000", "72.9 %"]
    assert rows[1] == ["Line that cannot be read", "−11", "0.1 %"]
    assert rows[4][1:] == ["−1", "< 0.1 %"]
    assert "<script>alert(1)</script>" in rows[4][0]  # as text: the page has no such element
    assert rows[5] == ["Repeated user and item", "0", "0 %"]
    amounts = [int(row[1].replace(",", "").replace("−", "-")) for row in rows]
    assert sum(amounts[:-1]) == amounts[-1]


def test_bars_of_the_steps_shrink_by_what_went(page_data: ReportData) -> None:
    whole = page_data.coverage.rows_read
    left = whole
    for drop, line in zip(page_data.coverage.drops, funnel(page_data.coverage)[1:-1], strict=True):
        left -= drop.value
        drawn = dict(re.findall(r'class="(fill|gone)"[^>]*? width="([\d.]+)"', line.bar))
        assert float(drawn["fill"]) == pytest.approx(100 * left / whole, abs=0.01)
        assert ("gone" in drawn) == (drop.value > 0)
        if drop.value / whole > 0.01:
            assert float(drawn["gone"]) == pytest.approx(100 * drop.value / whole, abs=0.01)
        assert sum(float(width) for width in drawn.values()) <= 100.01


def test_data_section_in_full(page_data: ReportData) -> None:
    html = render(page_data)
    text = visible(html)
    for expected in (
        "Users 1,200", "Items 300", "Interactions 9,000", "Density 2.5 %", "First interaction 2009-01-01",
        "Last interaction 2014-07-22", "3 damaged rows were repaired",
        "412 metadata rows, 2 could not be read and 1 was repaired.",
        "1 of 1,200 users (0.1 %) has no test target and is not evaluated.",
        "The most popular 20 % of the items hold 70.0 % of all interactions.",
        "42.2 characters", "3 images failed for temporary reasons", "dvc repro -f -s fetch_images",
    ):  # fmt: skip
        assert expected in text, expected
    assert table_of(html, "data-split")[0] == ["Training", "6,602", "73.4 %"]
    assert [row[0] for row in table_of(html, "data-split")] == [split.label for split in page_data.coverage.splits]
    assert table_of(html, "data-spread") == [
        ["Mean", "7.5", "30"], ["Fewest", "5", "5"], ["10 % have at most", "5", "6"], ["Half have at most", "7", "14"],
        ["90 % have at most", "12", "71"], ["99 % have at most", "21.5", "240"], ["Most", "48", "1,013"],
    ]  # fmt: skip
    assert table_of(html, "data-ties") == [
        ["Neighbouring interactions of a user", "68.7 %"], ["Test targets that share their time", "0 %"],
    ]  # fmt: skip
    assert "equal times is random" in text
    in_file_order = dataclasses.replace(page_data, coverage=dataclasses.replace(page_data.coverage, ties_policy="file"))
    assert "this order can leak the test target" in visible(render(in_file_order))
    assert table_of(html, "data-texts") == [
        ["Title", "> 99.9 %"], ["Brand", "81.2 %"], ["Price", "< 0.1 %"], ["Description", "0 %"],
    ]  # fmt: skip
    assert table_of(html, "data-images") == [
        ["Image stored", "290", "96.7 %"], ["No image in the metadata", "7", "2.3 %"],
        ["Removed from the server (404)", "0", "0 %"], ["No answer in time", "3", "1.0 %"],
    ]  # fmt: skip
    assert "10 % of the items hold 50 %" in html
    reasons = f"{page_data.coverage.values[1].reasons[0].label}: 9; Zero or less: 3"
    assert table_of(html, "data-values") == [["Title", "299", "0", ""], ["Price", "250", "12", reasons]]
    text = " ".join(visible(html).split())
    assert "Times of the reviews: in seconds: 12,330; no dates: 4. Converted to the unit of the edition: 1,330." in text
    assert "White space at the ends of ids was removed: 17 in the reviews, 2 in the metadata." in text


def test_data_section_of_a_shop_without_faults(page_data: ReportData) -> None:
    clean = dataclasses.replace(
        page_data.coverage,
        rows_repaired=0,
        metadata_rows_repaired=0,
        times=page_data.coverage.times[:1],
        num_times_converted=0,
        ids_repaired=0,
        metadata_ids_repaired=0,
        num_users_without_target=0,
        num_images_to_retry=0,
        long_tail=(),
    )
    text = visible(render(dataclasses.replace(page_data, coverage=clean)))
    assert "Every user has a test target." in text
    assert "repaired" not in text
    assert "fetch_images" not in text
    assert "Times of the reviews" not in text
    assert "White space" not in text
    assert "The long tail" not in text


def rows_of(html: str) -> dict[str, str]:
    """Rows of the result table by their header; a later recommender's row replaces an earlier one of the same variant."""
    table = re.search(r'<table class="results".*?</table>', html, re.DOTALL)
    assert table is not None
    return {
        m.group(1): m.group(2)
        for m in re.finditer(r'<tr>\s*<th scope="row"[^>]*>([^ <]*).*?</th>(.*?)</tr>', table.group(0), re.DOTALL)
    }


def test_what_validation_chose_is_marked_and_no_test_number_is(page_data: ReportData) -> None:
    html = render(page_data)
    assert html.count('class="chosen"') == 1
    assert re.search(r'<th scope="row" class="chosen">sda <span class="tag">chosen</span></th>', html)
    assert "best" not in visible(html[html.index('class="results"') : html.index("</table>")])


def test_a_variant_that_is_not_clearly_better_is_not_recommended(page_data: ReportData) -> None:
    unclear = [
        dataclasses.replace(result, changes=tuple(dataclasses.replace(change, low=-0.01, high=0.01) for change in result.changes))
        for result in page_data.results
    ]
    text = visible(render(dataclasses.replace(page_data, results=tuple(unclear))))
    assert "sasrec no clear choice sda is highest on validation, but not clearly better than id or zero_shot" in text
    assert "sasrec: use" not in text


def test_zero_shot_is_the_first_baseline(page_data: ReportData) -> None:
    """In the data the id comparison comes first."""
    html = render(page_data)
    assert html.index("NDCG<br>vs zero_shot") < html.index("NDCG<br>vs id")


def test_without_tail(page_data: ReportData) -> None:
    results = tuple(dataclasses.replace(r, tail_ndcg=None, tail_changes=(), tail_num_users=0) for r in page_data.results)
    text = visible(render(dataclasses.replace(page_data, results=results)))
    assert "No tail items." in text
    assert "Tail NDCG@10" not in text
    assert "with a tail target" not in text
    assert "No tail items." not in visible(render(page_data))


def test_the_cost_card_adds_up_what_ran_alone(page_data: ReportData, spent: Callable[..., Latest]) -> None:
    costs = (
        spent("filter", 1.5, counts={"rows_read": 3000}),
        spent("export_embeddings", 10.0, "id", counts={"items": 300}),
        spent("export_embeddings", 50.0, "zero_shot", counts={"items": 300}),
        spent("export_embeddings", 60.0, "sda", counts={"items": 300}, peak_mib=2048.0),
        spent("train_recommender", 20.0, "sda", child_peak_mib=700.0),
        spent("train_recommender", 18.0, "sda", True, recommender="sasrec", counts={"epochs": 36}),
        spent("train_recommender", 3.0, "sda", recommender="vbpr"),
    )
    html = render(dataclasses.replace(page_data, costs=costs))
    assert html == render(dataclasses.replace(page_data, costs=costs))
    text = visible(html)
    for expected in (
        "All stages 2 min 24 s", "Processor time 4 min 49 s", "Most memory 2.0 GiB",
        "Item vectors 5 items/s",  # of the slowest variant that has a model
        "filter 1.5 s 3.0 s 512 MiB 2,000 rows/s", "train_recommender sda 20.0 s 40.0 s 700 MiB sasrec 18.0 s",
        "train_recommender sda/vbpr 3.0 s", "Some <b>CPU</b>, 2 cores; last on 2026-11-26 (UTC)",
    ):  # fmt: skip
        assert expected in text, expected
    assert "sda costs" not in text
    assert html.count('<tr class="part">') == 1
    bars = re.findall(r'class="fill" width="([\d.]+)"', html[html.index('id="cost"') :])
    assert max(map(float, bars)) == 100.0
    for part in costs[:1]:  # a stage that took no time that could be measured
        assert "0.0 s" in visible(render(dataclasses.replace(page_data, costs=(spent(part.run.stage, 0.0),))))


def test_tables_of_experiments_are_text(page_data: ReportData) -> None:
    html = render(page_data)
    section = html[html.index('id="experiments"') : html.index('id="cost"')]
    assert section.count("<table") == 2
    assert section.count("<h3>") == 2
    assert "<script" not in section
    assert section.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2  # caption and cell
    labels = re.findall(r'aria-label="(Table [^"]*)"', section)
    assert labels == ["Table 1 of sweep-temperature", "Table 2 of sweep-temperature"]


def test_a_page_without_a_commit_does_not_speak_of_one(page_data: ReportData) -> None:
    assert page_data.commit is None
    assert "commit" not in visible(render(page_data))


def test_real_data_has_no_simulation_banner(page_data: ReportData) -> None:
    text = visible(render(dataclasses.replace(page_data, is_simulation=False, shop_users=None, notes=(), commit="abc123")))
    assert "Simulated" not in text
    assert "commit abc123" in text


def test_an_almost_empty_run(page_data: ReportData) -> None:
    bare = dataclasses.replace(
        page_data,
        results=(),
        validation_charts=(),
        adapter_charts=(),
        learning=(),
        examples=(),
        set_up=(),
    )
    html = render(bare)
    text = visible(html)
    assert "There are no evaluation results." in text
    for link in Outline(html).named("a"):
        assert f'id="{str(link["href"])[1:]}"' in html
    assert "Neighbours" not in text


def test_shared_neighbours_are_marked_with_more_than_a_frame(page_data: ReportData) -> None:
    html = render(page_data)
    assert html.count('<li class="shared">') == 1
    assert html.count(", shared</span>") == 1


def test_an_item_without_a_vector_has_no_neighbours(page_data: ReportData) -> None:
    (example,) = page_data.examples
    lists = example.lists[0], NeighborList("sda", ())
    html = render(dataclasses.replace(page_data, examples=(dataclasses.replace(example, lists=lists),)))
    assert "None: sda has no vector of this item, or no other item." in html
    assert "0 of 0 shared" not in html


@pytest.mark.parametrize(
    ("change", "arrow", "kind", "amount"),
    [
        (Change("id", 0.01, 0.1234, 0.001, 0.02, 0.01, None), "▲", "up", "+12.3\u00a0%"),
        (Change("id", -0.01, -0.1234, -0.02, -0.001, 0.01, None), "▼", "down", "−12.3\u00a0%"),
        (Change("id", 0.01, 0.1234, -0.001, 0.02, 0.2, None), "▲", "same", "+12.3\u00a0%"),
        (Change("id", 0.01, 0.1234, None, None, None, None), "▲", "same", "+12.3\u00a0%"),
        (Change("id", 0.0, 0.0, 0.0, 0.0, 1.0, None), "=", "same", "+0.0\u00a0%"),
        (Change("id", 0.01, None, 0.001, 0.02, 0.01, None), "▲", "up", "+0.0100"),
        (Change("id", 0.01, 0.1234, -0.001, 0.02, 0.01, None), "▲", "same", "+12.3\u00a0%"),
    ],
)
def test_changes_are_coloured_only_where_they_are_clear(change: Change, arrow: str, kind: str, amount: str) -> None:
    cell = change_cell(change)
    assert (cell.arrow, cell.kind, cell.amount) == (arrow, kind, amount)


@pytest.mark.parametrize(
    ("found", "targets", "said"),
    [
        ((0.07, 0.09), (1.0, 1.0), "hardly anything was learned"),
        ((0.07, 0.69), (1.1, 1.0), ""),
        ((0.95, 0.97), (1.1, 1.0), ""),  # there was nothing to gain
        ((0.07, 0.60), (1.3, 26.8), "its teacher became nearly uniform"),
        ((0.07, 0.60), (21.9, 31.0), ""),  # it was so from the beginning
        ((0.07, 0.60), (1.3, 15.0), ""),
    ],
)
def test_what_an_adapter_learned(found: tuple[float, float], targets: tuple[float, float], said: str) -> None:
    row = learned(Learning("sda", 100, 32, found, targets, (0.5, 0.6), (0.5, 0.6), False, 256, ()))
    assert row.verdict.startswith(said)
    assert bool(row.verdict) == bool(said)


def test_vectors_that_became_alike_come_first() -> None:
    row = learned(Learning("sda", 100, 32, (0.07, 0.6), (1.3, 26.8), (0.5, 0.999), (0.5, 0.6), True, 256, ()))
    assert row.verdict.startswith("its vectors have become alike")
    assert row.cosines == ("0.50", "1.00", "0.50", "0.60")


def test_the_table_of_what_was_learned(page_data: ReportData) -> None:
    text = visible(render(page_data))
    assert "chance is 3.1 %" in text
    assert text.count("hardly anything was learned") == 1
    assert text.count("its teacher became nearly uniform") == 1
    assert "26.8" in text
    assert "All figures of 256 items" in text
    assert all(figure in text for figure in ("1.25", "4.5", "\u22120.125", "0.999"))
    assert "What the adapters learned" not in visible(render(dataclasses.replace(page_data, learning=())))


def test_commands_are_code() -> None:
    assert with_code("Add <users>: `dvc exp run -S 'a=<1>'`") == (
        "Add &lt;users&gt;: <code>dvc exp run -S &#39;a=&lt;1&gt;&#39;</code>"
    )


def test_small_texts() -> None:
    assert [duration(seconds) for seconds in (0.04, 59.9, 60, 3599.6, 7265)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "1 h 0 min",
        "2 h 1 min",
    ]
    assert [p_text(p).replace("\u00a0", " ") for p in (None, 0.0002, 0.001, 0.5)] == ["", "p < 0.001", "p = 0.001", "p = 0.500"]


def test_numbers_as_text() -> None:
    assert [memory(mib).replace("\u00a0", " ") for mib in (0.4, 512.0, 1638.4)] == ["0 MiB", "512 MiB", "1.6 GiB"]
    shares = (0.0, 1e-9, 0.0005, 0.7291, 0.9994, 0.99951, 1.0)
    shown = ["0 %", "< 0.1 %", "0.1 %", "72.9 %", "99.9 %", "> 99.9 %", "100 %"]
    assert [percent(share).replace("\u00a0", " ") for share in shares] == shown
    densities = [small_percent(share).replace("\u00a0", " ") for share in (0.0, 2.2e-7, 0.000733, 0.025, 1.0)]
    assert densities == ["0 %", "0.000022 %", "0.0733 %", "2.5 %", "100 %"]
    assert [number(value) for value in (0, 1_234, 5.0, 8.876)] == ["0", "1,234", "5", "8.9"]
    assert [day(seconds) for seconds in (0, 86_399, 86_400, -1)] == ["1970-01-01", "1970-01-01", "1970-01-02", "1969-12-31"]
    assert day(2**62) == f"{2**62:,} s"


def contrast(first: str, second: str) -> float:
    """WCAG 2.1 contrast ratio of two ``#rrggbb`` colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_reach_aa_in_light_dark_and_print(page_data: ReportData) -> None:
    style = re.search(r"<style>(.*?)</style>", render(page_data), re.DOTALL)
    assert style is not None
    palettes = [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style.group(1), re.DOTALL)
    ]
    assert len(palettes) == 3
    for colours in palettes:
        for name in ("text", "muted", "accent", "up", "down"):
            for ground in ("page", "card"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for name in ("text", "muted", "up"):
            assert contrast(colours[name], colours["best"]) >= 4.5, name
        assert contrast(colours["warn-text"], colours["warn-page"]) >= 4.5
        assert contrast(colours["s2"], colours["page"]) >= 3.0  # what a step of the funnel took away
        for position in range(8):
            assert contrast(colours[f"s{position}"], colours["card"]) >= 3.0, position


def test_the_page_needs_no_torch() -> None:
    program = "import sys, sda_core.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
