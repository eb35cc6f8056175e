"""Everything the page says, as plain frozen data: whoever fills it needs no template, whoever draws it opens no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sda_core.costs import Latest


@dataclass(frozen=True)
class Fact:
    """A name and a value, both text."""

    name: str
    value: str


@dataclass(frozen=True)
class Variant:
    """A rung of the ladder: its name and, in a sentence, what its item vectors are."""

    name: str
    description: str


@dataclass(frozen=True)
class Score:
    """A metric with its 95 % interval, where there is one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Change:
    """A paired difference from a baseline variant; see ``evaluation.significance.Comparison``."""

    baseline: str
    difference: float
    relative: float | None
    low: float | None
    high: float | None
    p_value: float | None  # adjusted for the number of comparisons


@dataclass(frozen=True)
class Result:
    """One recommender on one variant.  ``tail_ndcg`` is None where no target is a tail item."""

    recommender: str
    variant: str
    num_users: int
    hit: Score
    ndcg: Score
    tail_num_users: int
    tail_ndcg: Score | None
    changes: tuple[Change, ...]  # of ndcg
    tail_changes: tuple[Change, ...]  # of tail_ndcg


@dataclass(frozen=True)
class Curve:
    """A line of a chart: (x, y) points in order of x."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A line chart."""

    title: str
    x_label: str
    y_label: str
    lower_is_better: bool
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Learning:
    """What an adapter's training says of itself, in its first step and over its last logged ones.

    ``found`` is how often an item of a batch is nearest to its own other side, ``targets`` how many items of the batch the
    teacher names in a row.  ``cosine_images`` and ``cosine_texts`` are the mean cosines of two items of a sample, before the
    training and after; ``collapsed`` says that a modality's vectors have become alike.  ``figures`` are all figures of that
    sample of ``num_sampled`` items, each with its label, before and after.
    """

    variant: str
    num_steps: int
    batch_size: int
    found: tuple[float, float]
    targets: tuple[float, float]
    cosine_images: tuple[float, float]
    cosine_texts: tuple[float, float]
    collapsed: bool
    num_sampled: int
    figures: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image, e.g. of media type ``image/jpeg``."""

    media_type: str
    data: bytes


@dataclass(frozen=True)
class Item:
    """What is shown of an item."""

    item_id: int
    title: str
    image: EncodedImage | None


@dataclass(frozen=True)
class Neighbor:
    """An item near another one; the score is the cosine of their vectors."""

    item: Item
    score: float


@dataclass(frozen=True)
class NeighborList:
    """An item's nearest items under one variant, nearest first."""

    variant: str
    neighbors: tuple[Neighbor, ...]


@dataclass(frozen=True)
class Example:
    """An item and its neighbours under each variant that has vectors; the first list is what the others are held against."""

    item: Item
    note: str
    lists: tuple[NeighborList, ...]


@dataclass(frozen=True)
class Count:
    """How many of a kind there are.  ``name`` is the key in the files of the run, ``label`` what a reader is told."""

    name: str
    label: str
    value: int


@dataclass(frozen=True)
class Share:
    """Which share (0..1) of the items has something."""

    label: str
    value: float


@dataclass(frozen=True)
class Spread:
    """A distribution in seven numbers; ``p10`` is the value that a tenth lies at or below."""

    mean: float
    minimum: float
    p10: float
    p50: float
    p90: float
    p99: float
    maximum: float


@dataclass(frozen=True)
class ValueCounts:
    """What became of the values that a field of the metadata gives; ``num_dropped`` is the sum of the ``reasons``."""

    name: str
    label: str
    num_used: int
    num_dropped: int
    reasons: tuple[Count, ...]


@dataclass(frozen=True)
class DataCoverage:
    """What came in, what was dropped and why, and what the kept part looks like.

    ``rows_read`` is ``num_interactions`` plus all ``drops``; the ``splits`` add up to ``num_interactions`` and the
    ``images`` to the number of items, and the ``unsupported_formats`` to the unsupported images.
    """

    rows_read: int
    drops: tuple[Count, ...]  # in the order of the filter
    rows_repaired: int
    metadata_rows_read: int
    metadata_rows_bad: int
    metadata_rows_repaired: int
    num_users: int
    num_items: int
    num_interactions: int
    density: float  # interactions / (users x items)
    first_time: int  # seconds since 1970
    last_time: int
    splits: tuple[Count, ...]
    ties: tuple[Share, ...]  # how much of the order of the histories rests on nothing but `filter.ties`
    ties_policy: Literal["random", "file"]
    num_users_without_target: int
    history_lengths: Spread
    item_counts: Spread
    share_top_20_percent: float  # of all interactions, held by the most popular fifth of the items
    long_tail: tuple[tuple[float, float], ...]  # share of items, most popular first; share of training interactions they hold
    texts: tuple[Share, ...]
    values: tuple[ValueCounts, ...]  # of the metadata that was read, by field
    times: tuple[Count, ...]  # of usable reviews, by how they were given
    num_times_converted: int  # not in the edition's unit
    ids_repaired: int  # white space at the ends removed
    metadata_ids_repaired: int
    mean_title_chars: float
    images: tuple[Count, ...]  # by status
    unsupported_formats: tuple[Count, ...]  # items whose image has a format that is not read
    unused_files: tuple[Count, ...]  # of the folder and the archive of images, by reason
    num_images_to_retry: int


@dataclass(frozen=True)
class Geometry:
    """How one variant's vectors of images and texts lie; see ``sda_core.report.vectors``.

    ``own_text_first`` is the share of items whose image has no text nearer than its own.
    """

    variant: str
    num_items: int
    alignment: float
    uniformity_image: float
    uniformity_text: float
    own_text_first: float


@dataclass(frozen=True)
class Found:
    """Shares of the items: whose nearest other item is of their leaf category, and to whom no item is nearer than they are."""

    same_category: float
    itself: float


@dataclass(frozen=True)
class ModalityDrop:
    """What a variant's vectors find when one modality is dropped; see ``sda_core.report.modality_drop``.

    ``num_asked`` of the ``num_items`` items have an image and a category; ``chance`` is that of ``same_category``.
    """

    variant: str
    num_items: int
    num_asked: int
    whole: Found
    without_text: Found
    without_image: Found
    chance: float


@dataclass(frozen=True)
class Conflict:
    """Two items that are alike in one modality and unlike in the other.

    ``image_cosine`` and ``text_cosine`` are the base model's, its mean vector taken off; ``fused`` are the cosines of the
    vectors that recommenders see, by variant.
    """

    first: Item
    second: Item
    alike_in: str  # image or text
    image_cosine: float
    text_cosine: float
    fused: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class VectorMap:
    """Items on a plane: a point each, 0..1; ``pairs`` are places of points that belong together, as in the conflicts."""

    variant: str
    points: tuple[tuple[float, float], ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class GateMap:
    """Which experts each modality uses: ``mass[block][modality][expert]``, a modality's add up to 1.

    ``largest_difference`` is that of one expert's mass between two modalities, over all ``num_layers`` adapted layers.
    """

    variant: str
    blocks: tuple[int, ...]
    modalities: tuple[str, ...]
    mass: tuple[tuple[tuple[float, ...], ...], ...]
    num_layers: int
    largest_difference: float


@dataclass(frozen=True)
class Table:
    """A table of texts; ``caption`` and ``remark`` may be empty."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remark: str


@dataclass(frozen=True)
class Experiment:
    """What an experiment left under ``experiments/``: tables, plots, and a remark each on what cannot be shown."""

    name: str
    tables: tuple[Table, ...]
    plots: tuple[EncodedImage, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """What a stage left on disk."""

    stage: str
    files: int
    bytes: int
    note: str


@dataclass(frozen=True)
class ReportData:
    """The whole page.

    ``costs`` are those of the stages and ``experiments`` what the scripts in ``experiments/`` left; both are empty on the page
    of the pipeline, which is the same for equal runs.  ``commit`` is None there too (equal runs may be at different commits),
    and where it is not known.
    """

    title: str
    dataset: str
    is_simulation: bool
    notes: tuple[str, ...]  # what a reader must know before the numbers, a sentence each
    version: str
    commit: str | None
    set_up: tuple[Fact, ...]
    variants: tuple[Variant, ...]
    coverage: DataCoverage
    cutoff: int
    ties: str
    tail_definition: str
    results: tuple[Result, ...]
    validation_charts: tuple[Chart, ...]
    adapter_charts: tuple[Chart, ...]
    learning: tuple[Learning, ...]
    examples: tuple[Example, ...]
    geometry: tuple[Geometry, ...]
    modality_drops: tuple[ModalityDrop, ...]
    conflicts: tuple[Conflict, ...]
    maps: tuple[VectorMap, ...]
    gates: tuple[GateMap, ...]
    experiments: tuple[Experiment, ...]
    sizes: tuple[Size, ...]
    costs: tuple[Latest, ...]
