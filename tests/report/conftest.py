"""A page's worth of plain data, with the awkward cases in it."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from PIL import Image, ImageDraw

from sda_core.costs import Latest, Run
from sda_core.report.model import (
    Change,
    Chart,
    Conflict,
    Count,
    Curve,
    DataCoverage,
    EncodedImage,
    Example,
    Experiment,
    Fact,
    Found,
    GateMap,
    Geometry,
    Item,
    Learning,
    ModalityDrop,
    Neighbor,
    NeighborList,
    ReportData,
    Result,
    Score,
    Share,
    Size,
    Spread,
    Table,
    ValueCounts,
    Variant,
    VectorMap,
)

NASTY = "<script>alert(1)</script> \"quoted\" & 'single' <img src=x onerror=alert(2)>"


def drawn_image(hue: int) -> bytes:
    image = Image.new("RGB", (60, 40), (hue % 256, 90, 200 - hue % 200))
    ImageDraw.Draw(image).ellipse((10, 5, 50, 35), fill=(250, hue % 256, 30))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def coverage() -> DataCoverage:
    """A shop of 300 items, of which the first 60 hold 70 % of the interactions."""
    return DataCoverage(
        rows_read=12_345,
        drops=(
            Count("rows_bad", "Line that cannot be read", 11),
            Count("rows_dropped_rating", "Rating below 3", 1_204),
            Count("rows_dropped_core", "User or item too rare", 2_129),
            Count("rows_dropped_no_image", NASTY, 1),
            Count("rows_dropped_duplicate", "Repeated user and item", 0),
        ),
        rows_repaired=3,
        metadata_rows_read=412,
        metadata_rows_bad=2,
        metadata_rows_repaired=1,
        num_users=1200,
        num_items=300,
        num_interactions=9000,
        density=0.025,
        first_time=1_230_768_000,
        last_time=1_406_073_599,
        splits=(
            Count("num_train", "Training", 6_602),
            Count("num_valid", "Validation", 1_199),
            Count("num_test", "Test", 1_199),
            Count("num_rest", "Further rows of the held-out periods", 0),
        ),
        ties=(Share("Neighbouring interactions of a user", 0.687), Share("Test targets that share their time", 0.0)),
        ties_policy="random",
        num_users_without_target=1,
        history_lengths=Spread(7.5, 5, 5.0, 7.0, 12.0, 21.5, 48),
        item_counts=Spread(30.0, 5, 6.0, 14.0, 71.0, 240.0, 1_013),
        share_top_20_percent=0.7004,
        long_tail=((0.0, 0.0), (0.01, 0.2), (0.1, 0.5), (0.2, 0.7), (0.5, 0.9), (1.0, 1.0)),
        texts=(Share("Title", 0.9997), Share("Brand", 0.812), Share("Price", 0.0003), Share("Description", 0.0)),
        values=(
            ValueCounts("title", "Title", 299, 0, (Count("values_dropped_title_markup", "Markup", 0),)),
            ValueCounts(
                "price",
                "Price",
                250,
                12,
                (
                    Count("values_dropped_price_not_understood", NASTY, 9),
                    Count("values_dropped_price_blank", "Empty, or a placeholder", 0),
                    Count("values_dropped_price_not_positive", "Zero or less", 3),
                ),
            ),
        ),
        times=(Count("times_in_seconds", "In seconds", 12_330), Count("times_without_date", "No dates", 4)),
        num_times_converted=1_330,
        ids_repaired=17,
        metadata_ids_repaired=2,
        mean_title_chars=42.25,
        images=(
            Count("ok", "Image stored", 290),
            Count("missing_url", "No image in the metadata", 7),
            Count("http_404", "Removed from the server (404)", 0),
            Count("timeout", "No answer in time", 3),
        ),
        unsupported_formats=(),
        unused_files=(),
        num_images_to_retry=3,
    )


def _spent(stage: str, seconds: float, variant: str | None = None, is_part: bool = False, **changes: object) -> Latest:
    values = {
        "stage": stage, "variant": variant, "recommender": None, "started": datetime(2026, 11, 26, 4, 30, tzinfo=UTC),
        "seconds": seconds, "cpu_seconds": 2 * seconds, "peak_mib": 512.0, "child_peak_mib": None, "gpu_peak_mib": None,
        "counts": {}, "cores": 2, "threads": 1, "processes": 1, "cpu": "Some <b>CPU</b>", "gpu": None, "version": "0.1.0",
    }  # fmt: skip
    return Latest(Run.model_validate(values | changes), is_part)


FIGURES = (("Effective targets of the teacher", 1.25, 4.5), ("Mean cosine of the texts of two items", -0.125, 0.999))


@pytest.fixture
def spent() -> Callable[..., Latest]:
    """The cost of a stage: its name, seconds, variant, whether it is a part, and what else is known."""
    return _spent


@pytest.fixture
def page_data() -> ReportData:
    def score(value: float) -> Score:
        return Score(value, value - 0.004, value + 0.005)

    items = [Item(n, NASTY if n == 1 else f"Item title {n}", EncodedImage("image/png", drawn_image(20 * n))) for n in range(1, 7)]
    items.append(Item(7, "", None))

    def near(*numbers: int) -> tuple[Neighbor, ...]:
        return tuple(Neighbor(items[n - 1], 0.9 - 0.1 * place) for place, n in enumerate(numbers))

    up = Change("zero_shot", 0.002, 0.0417, 0.001, 0.003, 0.0004, 0.0004)
    unclear = Change("id", -0.001, -0.0196, -0.004, 0.002, 0.61, 0.0001)
    gone = Change("id", 0.0, None, 0.0, 0.0, 1.0, 0.0)
    results = (
        Result("pop", "any", 1200, score(0.02), score(0.01), 90, score(0.006), None, (), ()),
        Result("sasrec", "id", 1200, score(0.09), score(0.0510), 90, score(0.02), 0.061, (), ()),
        Result("sasrec", "zero_shot", 1200, score(0.08), score(0.0480), 90, score(0.02), 0.058, (gone,), (gone,)),
        Result("sasrec", "sda", 1200, score(0.11), score(0.0500), 90, score(0.03), 0.063, (up, unclear), (up, unclear)),
    )
    curves = (
        Curve("id", ((1.0, 0.01), (2.0, 0.03), (3.0, 0.02))),
        Curve("zero_shot", ((1.0, 0.02), (2.0, 0.025))),
        Curve("sda", ()),
    )
    return ReportData(
        title=NASTY,
        dataset="the built-in shop",
        is_simulation=True,
        shop_users=1500,
        notes=("The backbone has random weights.",),
        version="0.1.0",
        commit=None,
        set_up=(Fact("Backbone", NASTY),),
        variants=(Variant("id", "ids"), Variant("zero_shot", "base"), Variant("sda", "adapted")),
        controls=(),
        trained=("sda",),
        num_seeds=3,
        coverage=coverage(),
        cutoff=10,
        ties="pessimistic",
        tail_definition="items with fewer than 4 training interactions",
        results=results,
        validation_charts=(Chart("sasrec", "epoch", "Validation NDCG@10", False, curves),),
        adapter_charts=(Chart("sda", "step", "Training loss", True, (Curve("sda", ((5.0, 3.0), (10.0, 1.5), (15.0, 1.6))),)),),
        learning=(
            Learning("lora", 1200, 32, (0.0625, 0.07), (1.0, 1.0), (0.53, 0.5), (0.54, 0.51), False, 256, FIGURES),
            Learning("sda", 1200, 32, (0.0625, 0.4), (1.3, 26.77), (0.53, 0.61), (0.54, 0.6), False, 256, FIGURES),
        ),
        examples=(
            Example(
                items[0],
                "50 training interactions",
                (NeighborList("zero_shot", near(2, 3, 4)), NeighborList("sda", near(3, 5, 7))),
            ),
        ),
        geometry=(Geometry("zero_shot", 290, 1.81, -1.77, -1.75, 0.0069), Geometry("sda", 290, 1.2, -1.9, -1.8, 0.31)),
        modality_drops=(
            ModalityDrop("zero_shot", 300, 289, Found(0.9, 1.0), Found(0.8, 0.77), Found(0.121, 0.0), 0.12),
            ModalityDrop("sda", 300, 289, Found(0.91, 1.0), Found(0.85, 0.7), Found(0.86, 0.6), 0.12),
        ),
        conflicts=(
            Conflict(items[1], items[2], "image", 0.91, -0.24, (("zero_shot", 0.47), ("sda", 0.12))),
            Conflict(items[0], items[6], "text", -0.3, 0.8, (("zero_shot", 0.2), ("sda", -0.05))),
        ),
        maps=(
            VectorMap("zero_shot", ((0.0, 0.0), (1.0, 0.5), (0.2, 0.3), (0.4, 1.0), (0.6, 0.6)), ((0, 1), (2, 3))),
            VectorMap("sda", ((0.0, 0.1), (1.0, 0.5), (0.2, 0.3), (0.4, 1.0), (0.6, 0.6)), ((0, 1), (2, 3))),
        ),
        gates=(GateMap("sda", (0, 1), ("image", "text"), (((0.9, 0.1), (0.2, 0.8)), ((0.5, 0.5), (0.5, 0.5))), 14, 0.7),),
        experiments=(
            Experiment(
                "sweep-temperature",
                (
                    Table(NASTY, ("variant", "ndcg@10"), (("sda", "0.05"), (NASTY, "0.04")), "3 more rows"),
                    Table("", ("a",), (("b",),), ""),
                ),
                (EncodedImage("image/png", drawn_image(3)),),
                (),
            ),
            Experiment("other/table.tsv", (), (), ("cannot be read as a table (ComputeError)",)),
        ),
        sizes=(Size("filter", 4, 1_234_567, ""), Size("train_adapter", 8, 999, "64 items seen by each adapter")),
        costs=(),
    )
