"""The content of the page as frozen dataclasses, which separate reading files from rendering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sda_core.costs import Latest


@dataclass(frozen=True)
class Fact:
    """A name and a value, both texts."""

    name: str
    value: str


@dataclass(frozen=True)
class Variant:
    """A variant of the ladder: its name, and a description of its item vectors in one sentence."""

    name: str
    description: str


@dataclass(frozen=True)
class Score:
    """A metric with its 95 % interval, if there is one."""

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
    p_value: float | None  # adjusted for the number of comparisons, unless one of the two is a control
    seed_margin: float | None  # half of the interval's width due to the seeds alone


@dataclass(frozen=True)
class Result:
    """One recommender on one variant, mean over its seeds.

    ``tail_ndcg`` is None if no target is a tail item, ``valid_ndcg`` (NDCG@10 on the validation targets) is None without
    validation.
    """

    recommender: str
    variant: str
    num_users: int
    hit: Score
    ndcg: Score
    tail_num_users: int
    tail_ndcg: Score | None
    valid_ndcg: float | None
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
    """Diagnostics of an adapter's training, in its first step and averaged over its last logged steps.

    ``found`` is retrieval@1 within a batch, ``targets`` the effective targets of the teacher.  ``cosine_images`` and
    ``cosine_texts`` are the mean cosines between two items of a sample, before and after training; ``collapsed`` means that
    a modality's vectors have collapsed.  ``figures`` are all figures of that sample of ``num_sampled`` items, each with its
    label, before and after.
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
    """The displayed fields of an item."""

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
    """An item and its neighbours under each variant with vectors; the other lists are compared with the first."""

    item: Item
    note: str
    lists: tuple[NeighborList, ...]


@dataclass(frozen=True)
class Count:
    """A count.  ``name`` is the key in the files of the run, ``label`` the displayed name."""

    name: str
    label: str
    value: int


@dataclass(frozen=True)
class Share:
    """A share (0..1) of the items."""

    label: str
    value: float


@dataclass(frozen=True)
class Spread:
    """A distribution in seven numbers; ``p10`` is the 10th percentile."""

    mean: float
    minimum: float
    p10: float
    p50: float
    p90: float
    p99: float
    maximum: float


@dataclass(frozen=True)
class ValueCounts:
    """Counts of used and dropped values of a metadata field; ``num_dropped`` is the sum of the ``reasons``."""

    name: str
    label: str
    num_used: int
    num_dropped: int
    reasons: tuple[Count, ...]


@dataclass(frozen=True)
class DataCoverage:
    """Counts of rows read and dropped, with reasons, and statistics of the kept data.

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
    ties: tuple[Share, ...]  # how much of the order of the histories depends on `filter.ties`
    ties_policy: Literal["random", "file"]
    num_users_without_target: int
    history_lengths: Spread
    item_counts: Spread
    share_top_20_percent: float  # share of all interactions with the most popular fifth of the items
    long_tail: tuple[tuple[float, float], ...]  # share of items, most popular first; share of their training interactions
    texts: tuple[Share, ...]
    values: tuple[ValueCounts, ...]  # metadata values by field
    times: tuple[Count, ...]  # usable reviews by unit of time
    num_times_converted: int  # not in the edition's unit
    ids_repaired: int  # white space at the ends removed
    metadata_ids_repaired: int
    mean_title_chars: float
    images: tuple[Count, ...]  # by status
    unsupported_formats: tuple[Count, ...]  # items whose image has a format that is not supported
    unused_files: tuple[Count, ...]  # files in the folder and the archive of images, by reason
    num_images_to_retry: int


@dataclass(frozen=True)
class Geometry:
    """The geometry of one variant's image and text vectors; see ``sda_core.report.vectors``.

    ``own_text_first`` is the share of items whose own text is the nearest to their image (image-to-text retrieval@1).
    """

    variant: str
    num_items: int
    alignment: float
    uniformity_image: float
    uniformity_text: float
    own_text_first: float


@dataclass(frozen=True)
class Found:
    """Shares of items: whose nearest other item has their leaf category, and who are nearest to themselves."""

    same_category: float
    itself: float


@dataclass(frozen=True)
class ModalityDrop:
    """Nearest neighbours of a variant's vectors without one modality; see ``sda_core.report.modality_drop``.

    ``num_asked`` of the ``num_items`` items have an image and a category; ``chance`` is the chance level of ``same_category``.
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
    """Two items that are similar in one modality and different in the other.

    ``image_cosine`` and ``text_cosine`` are those of the base model after subtracting the mean vector; ``fused`` are the
    cosines of the recommenders' vectors, by variant.
    """

    first: Item
    second: Item
    alike_in: str  # image or text
    image_cosine: float
    text_cosine: float
    fused: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class VectorMap:
    """Items as points in the plane, 0..1; ``pairs`` are indices of the two points of each conflicting pair."""

    variant: str
    points: tuple[tuple[float, float], ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class GateMap:
    """Gate values: ``mass[block][modality][expert]``, with sum 1 for each modality.

    ``largest_difference`` is the largest difference of an expert's mass between two modalities, over all ``num_layers``
    adapted layers.
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
    """The results of an experiment under ``experiments/``: tables, plots, and remarks on files that cannot be shown."""

    name: str
    tables: tuple[Table, ...]
    plots: tuple[EncodedImage, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """The size of a stage's output on disk."""

    stage: str
    files: int
    bytes: int
    note: str


@dataclass(frozen=True)
class ReportData:
    """The content of the whole page.

    ``costs`` are those of the stages, ``experiments`` the results of the scripts in ``experiments/``; both are empty on the
    page of the pipeline, which is equal for equal runs.  ``commit`` is None there, too (equal runs may have different
    commits), and if it is unknown.
    """

    title: str
    dataset: str
    is_simulation: bool
    shop_users: int | None  # number of simulated users, if it is the built-in shop
    notes: tuple[str, ...]  # notes for the interpretation of the results, a sentence each
    version: str
    commit: str | None
    set_up: tuple[Fact, ...]
    variants: tuple[Variant, ...]
    controls: tuple[str, ...]  # variants that cannot be chosen: random, shuffled and oracle vectors
    trained: tuple[str, ...]  # variants with an adapter
    num_seeds: int
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
