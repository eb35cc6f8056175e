"""The typed mirror of ``params.yaml``: same order, no defaults, unknown keys are errors.

* Every model is frozen and strict and forbids unknown keys.  **No field has a default**, because DVC tracks the contents of
  the file: a default in code would change results without making anything stale.
* YAML is read as version 1.2 (ruamel), as in DVC; PyYAML would read ``2e-4`` as a string.
* All problems are reported at once, each with its path and the given value, including contradictory settings, before
  anything is downloaded or loaded.
* Nothing here changes a result: sections have validators and no other behaviour (``tests/test_architecture.py``), so no
  stage depends on this file.
* A function takes its own section (``FilterParams``), never the whole tree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sda_core.errors import ConfigError


def _cut(value: float | str) -> float | str:
    """A calendar day in the form 2014-01-31, or a share between 0 and 1."""
    try:
        fits = date.fromisoformat(value).isoformat() == value if isinstance(value, str) else 0.0 < value < 1.0
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"should be a day such as 2014-01-31, or a share between 0 and 1 (got {value!r})")
    return value


NUM_MODALITIES = 2  # of the pipeline: image and text
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=64)]
Oracle = Literal["oracle", "oracle_shared", "oracle_image", "oracle_text", "oracle_named"]  # of the built-in shop
Control = Literal["random", "shuffled", "image_only", "text_only", Oracle]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Strength = Annotated[float, Field(ge=0.0, le=1000.0)]
_LARGEST = 2**53  # what JSON and float64 express exactly; an address or a size beyond it is a mistake
Count = Annotated[int, Field(ge=1, le=_LARGEST)]
CountOrZero = Annotated[int, Field(ge=0, le=_LARGEST)]
TrainingSeed = Annotated[int, Field(ge=0, le=2**31 - 1)]  # a column Int32 of the tables of positions
Length = Annotated[int, Field(ge=1, le=100_000)]  # of histories, which are padded to it
Seconds = Annotated[int, Field(ge=0, le=10**9)]  # about 32 years
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Cut = Annotated[float | str, AfterValidator(_cut)]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A list without duplicates."""
    twice = list(dict.fromkeys(value for value in values if values.count(value) > 1))
    if twice:
        raise ValueError(f"should name each once (got {', '.join(str(value) for value in twice)} more than once)")
    return values


Distinct = AfterValidator(_distinct)


class Section(BaseModel):
    """Base class of every section: unknown keys are errors, values are not coerced, numbers are finite, objects are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# ----------------------------------------------------------------------------------------------- dataset
class DemoDataset(Section):
    """The built-in shop: a simulation that writes raw files in the format of a real edition: docs/shop.md."""

    source: Literal["demo"]  # the built-in shop
    edition: Literal[2014, 2018, 2023]  # edition of the file format
    category: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=64)]  # name of the shop
    seed: CountOrZero  # seed of the generator
    num_users: Annotated[int, Field(ge=20, le=10_000_000)]  # users before the filter
    num_items: Annotated[int, Field(ge=20, le=1_000_000)]  # items before the filter
    mean_history_length: Annotated[float, Field(ge=5.0, le=200.0)]  # mean number of purchases per user
    popularity_exponent: Strength  # exponent of the Zipf law of item popularity; 0 = uniform
    new_item_share: Annotated[float, Field(ge=0.0, le=0.5)]  # share of the items that arrive later than the first day
    content_strength: Strength  # strength of the latent attributes in users' choices; 0 = negative control
    image_share: Share  # share of this strength that only the image shows
    text_share: Share  # share of this strength that only the text can name; both show the rest
    sequence_strength: Strength  # strength of the last item in the choice of the next one
    same_day_share: Share  # probability that a purchase is on the same day as the user's previous one
    text_completeness: Share  # completeness of the texts: 1 = every text names all of its attributes
    text_noise: Share  # probability that a word of a title or description is dropped, replaced or misspelt
    image_clutter: Share  # amount of other content in the images; 0 = only the product
    missing_image_share: Share  # items without an image
    missing_description_share: Share  # items without a description
    missing_metadata_share: Share  # items without a metadata line
    quirk_share: Share  # probability that a line has one of the edition's real defects
    image_side: Annotated[int, Field(ge=16, le=1024)]  # width and height of an image in pixels

    @property
    def local_folder(self) -> None:
        """Always None: the images of the built-in shop are part of its raw files."""
        return

    @property
    def image_folder(self) -> None:
        """As :attr:`local_folder`."""
        return

    @model_validator(mode="after")
    def _shares_fit(self) -> DemoDataset:
        if self.image_share + self.text_share > 1.0:
            raise ValueError("image_share + text_share must be at most 1")
        return self


class AmazonDataset(Section):
    """Raw files of one edition, as published or mirrored; each list is tried in turn."""

    source: Literal["amazon"]  # files in the format of the Amazon reviews, also your own
    edition: Literal[2014, 2018, 2023]  # format of the files: docs/data.md
    category: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=64)]  # a name for the report
    reviews: Annotated[tuple[str, ...], Field(min_length=1)]  # URLs, file: URLs or plain paths, tried in order
    metadata: Annotated[tuple[str, ...], Field(min_length=1)]  # likewise
    image_archive: Annotated[tuple[str, ...], Field(min_length=1)] | None  # a zip or tar file of images, sources as above
    reviews_sha256: Sha256 | None  # a file with another hash is rejected; null: not checked
    metadata_sha256: Sha256 | None  # likewise
    image_archive_sha256: Sha256 | None  # likewise
    image_folder: str | None  # images as <item id>.jpg or under the metadata's paths; missing ones are fetched
    local_folder: str | None  # if set: all files are read from here by base name, images from <folder>/images; no network


Dataset = Annotated[DemoDataset | AmazonDataset, Field(discriminator="source")]


class LocalFilesParams(Section):
    """The local files and folders in ``dataset`` and ``backbone``: see ``sda_core.local_files``."""

    reviews: str
    metadata: str
    image_archive: str
    local_folder: str
    local_images: str  # images of local_folder, if that folder is a link or cannot be watched as a whole
    image_folder: str
    backbone: str


class DownloadParams(Section):
    """The download of raw files."""

    timeout_seconds: Positive  # without an answer or enough bytes
    num_retries: CountOrZero  # attempts without progress before the next source is used
    backoff_seconds: NonNegative  # before the first retry; doubles each time
    max_file_bytes: Count  # a longer file is rejected


class FilterParams(Section):
    """The filter of interactions and items, and the split."""

    method: Literal["kcore", "single_pass"]  # kcore: until every user and item has enough; single_pass: thresholds counted once
    min_user_interactions: Count  # users with fewer are dropped
    min_item_interactions: Count  # items with fewer are dropped
    duplicates: Literal["first", "last", "keep"]  # the kept one of several interactions of a user with an item; keep: all
    ties: Literal["random", "file"]  # order of a user's interactions with equal times; file: that of the raw lines
    ties_seed: CountOrZero  # seed of `ties: random`
    time_resolution_seconds: Seconds  # times are rounded down to multiples of it; 86400: days; 0: no rounding
    items_without_metadata: Literal["drop", "keep"]  # items without a line in the metadata
    items_without_image: Literal["drop", "keep"]  # items without an image in the metadata
    min_rating: NonNegative  # lower ratings are dropped
    max_bad_line_share: Share  # the stage stops if more lines cannot be read
    split: Literal["leave_one_out", "global_time"]  # leave_one_out: each user's last two items; global_time: two points in time
    valid_from: Cut | None  # global_time: begin of the validation, a day (UTC) or the share of interactions before it
    test_from: Cut | None  # global_time: begin of the test

    @model_validator(mode="after")
    def _cuts_fit(self) -> FilterParams:
        cuts = (self.valid_from, self.test_from)
        if self.split == "leave_one_out":
            if cuts != (None, None):
                raise ValueError("valid_from and test_from must be null with split 'leave_one_out' (they would be ignored)")
            return self
        match cuts:
            case (str(valid), str(test)) if valid < test:
                pass
            case (float(valid), float(test)) if valid < test:
                pass
            case _:
                raise ValueError(
                    "split 'global_time' needs valid_from before test_from, both days (2014-01-01) or both shares (0.8);"
                    f" got {self.valid_from!r} and {self.test_from!r}"
                )
        return self


class FetchImagesParams(Section):
    """Fetching, checking and storing the images of the kept items."""

    num_workers: Annotated[int, Field(ge=1, le=256)]  # requests at once
    max_per_host: Annotated[int, Field(ge=1, le=64)]  # requests at once to one host
    timeout_seconds: Positive  # without an answer or enough bytes
    num_retries: CountOrZero  # for each address
    backoff_seconds: NonNegative  # before the first retry; doubles each time
    max_bytes: Count  # maximum size of an image file
    max_pixels: Count  # images with more are not decoded
    stored_pixels: Annotated[int, Field(ge=256)]  # images with more are reduced; see backbone.max_pixels
    shard_rows: Count  # images in one file


class ItemsParams(Section):
    """The prompts of an item, and what takes the place of a missing image or text."""

    noun: Annotated[str, Field(min_length=1, max_length=64)]  # word for an item in the prompts, for example film
    text_opening: Annotated[str, Field(min_length=1)]  # first words of the text prompt; {noun} is filled in
    fields: Annotated[
        tuple[Literal["title", "brand", "price", "categories", "features", "description"], ...], Field(min_length=1), Distinct
    ]  # fields of the text prompt, in this order
    max_value_chars: Count  # maximum length of each field; longer ones are truncated
    image_prompt: Annotated[str, Field(min_length=1)]  # the text beside an image; {noun} is filled in
    missing_image: Literal["placeholder", "text_only"]  # use a fixed grey image, or make only a text embedding
    missing_text: Literal["placeholder", "image_only"]  # use a prompt that says unknown, or make only an image embedding


# ---------------------------------------------------------------------------------------------- backbone
class TinyQwen25VL(Section):
    """A seeded, randomly initialised Qwen2.5-VL of a few hundred thousand parameters, with a byte tokenizer."""

    kind: Literal["tiny_qwen2_5_vl"]
    seed: CountOrZero  # seed of the random weights
    hidden_size: Annotated[int, Field(ge=16, multiple_of=16)]  # width of the language model
    num_layers: Count  # blocks of the language model
    num_heads: Count  # attention heads of the language model
    vision_hidden_size: Annotated[int, Field(ge=16, multiple_of=16)]  # width of the vision tower
    vision_depth: Count  # blocks of the vision tower
    min_pixels: Count  # smaller images are enlarged
    max_pixels: Count  # larger images are reduced
    max_text_tokens: Count  # longer texts are truncated
    pooling: Literal["mean", "last"]  # mean of all token states, or the last token's


class Nano(Section):
    """The small pre-trained Qwen2.5-VLs that are part of the package; nano 2 sees products, nano hardly does."""

    kind: Literal["nano", "nano2"]
    min_pixels: Count  # smaller images are enlarged
    max_pixels: Count  # larger images are reduced
    max_text_tokens: Count  # longer texts are truncated
    pooling: Literal["mean", "last"]  # mean of all token states, or the last token's


class Checkpoint(Section):
    """Base class of published checkpoints: a hub id with a pinned revision, or a local folder."""

    name: Annotated[str, Field(min_length=1)]  # a hub id such as owner/name, or a folder
    revision: Annotated[str, Field(min_length=1)] | None  # a commit of the hub id; null only for a local folder
    dtype: Literal["float32", "bfloat16", "float16"]  # dtype of the frozen weights
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"]  # auto: FlashAttention if it is installed, else sdpa
    max_text_tokens: Count  # longer texts are truncated


class QwenVLCheckpoint(Checkpoint):
    """Base class of the Qwen-VL families: images of any size, with a number of tokens proportional to their pixels."""

    min_pixels: Count  # smaller images are enlarged
    max_pixels: Count  # larger images are reduced
    pooling: Literal["mean", "last"]  # mean of all token states, or the last token's


class Qwen2VL(QwenVLCheckpoint):
    """A Qwen2-VL checkpoint."""

    kind: Literal["qwen2_vl"]


class Qwen25VL(QwenVLCheckpoint):
    """A Qwen2.5-VL checkpoint."""

    kind: Literal["qwen2_5_vl"]


class Qwen3VL(QwenVLCheckpoint):
    """A (dense) Qwen3-VL checkpoint."""

    kind: Literal["qwen3_vl"]


class LlavaOnevision(Checkpoint):
    """A LLaVA-OneVision checkpoint in transformers' own format (``llava-hf/...``)."""

    kind: Literal["llava_onevision"]
    max_tiles: CountOrZero  # tiles in addition to the whole image; 0: only the whole image
    pooling: Literal["mean", "last"]  # mean of all token states, or the last token's


class InternVL(Checkpoint):
    """An InternVL checkpoint in transformers' own format (``OpenGVLab/...-hf``)."""

    kind: Literal["internvl"]
    max_tiles: CountOrZero  # tiles in addition to the whole image; 0 and 1: only the whole image
    pooling: Literal["mean", "last"]  # mean of all token states, or the last token's


class SmolVLM(Checkpoint):
    """A SmolVLM, SmolVLM2 or Idefics3 checkpoint."""

    kind: Literal["smolvlm"]
    max_tiles: CountOrZero  # tiles in addition to the whole image; below 4: only the whole image
    pooling: Literal["mean", "last"]  # mean of all token states, or the last token's


class CLIP(Checkpoint):
    """A CLIP checkpoint: two towers, each with its own pooling."""

    kind: Literal["clip"]


class SigLIP(Checkpoint):
    """A SigLIP 2 checkpoint of fixed resolution (or a SigLIP one with a ``tokenizer.json``): two towers, like CLIP."""

    kind: Literal["siglip"]


BackboneParams = Annotated[
    TinyQwen25VL | Nano | Qwen2VL | Qwen25VL | Qwen3VL | LlavaOnevision | InternVL | SmolVLM | CLIP | SigLIP,
    Field(discriminator="kind"),
]


# ----------------------------------------------------------------------------------------- train_adapter
Targets = Literal["language", "language_and_vision"]


class TrainedVariant(Section):
    """The adapter section and the loss section of ``train_adapter`` for a trained variant."""

    adapter: Literal["lora", "moda"]  # section of train_adapter
    loss: Literal["infonce", "loss"]  # section of train_adapter


class TrainingParams(Section):
    """The adapter's optimisation."""

    seed: CountOrZero  # seed of the initial weights, the batches and dropout
    num_steps: CountOrZero  # optimizer steps
    batch_size: Annotated[int, Field(ge=2)]  # items per step, over all processes
    micro_batch_size: Count | None  # items per pass of one process (gradient caching); null: its whole part of the batch
    learning_rate: Positive  # of AdamW, after the warm-up
    weight_decay: NonNegative  # of AdamW
    warmup_steps: CountOrZero  # steps until the learning rate reaches its value
    max_grad_norm: Positive  # gradients are clipped to this norm
    gradient_checkpointing: bool  # saves memory by a second forward pass; the same result
    sharding: Literal["none", "fsdp"]  # fsdp: the frozen base is sharded over the processes
    check: Literal["stop", "warn"]  # what to do if the vectors are about to collapse, or do: sda_core.alignment.check
    vision_cache: Literal[
        "never", "auto", "always"
    ]  # the frozen vision tower's outputs, computed once per item and cached on disk
    checkpoint_every: Count  # steps
    log_every: Count  # steps


class AdapterParams(Section):
    """A mixture of low-rank experts; ``num_experts: 1`` with ``gate: uniform`` is plain LoRA."""

    r: Count  # total LoRA rank
    lora_alpha: Positive  # numerator of the adapter's scale, lora_alpha / r
    use_rslora: bool  # scale lora_alpha / sqrt(r) instead of lora_alpha / r
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)]  # dropout of the adapter's inputs
    variant: Literal["paper", "reference"]  # reference: one dropout mask per expert, as in the public code
    num_experts: Count  # low-rank experts of each layer
    expert_rank: Literal["split", "full"]  # split: r / num_experts for each expert; full: r for each
    gate: Literal[
        "modality", "onehot", "uniform"
    ]  # weights of the experts: learned by modality, fixed by modality (onehot), or equal (uniform)
    modality_dim: Count  # width of the gate's modality embeddings
    targets: Targets  # adapted linear layers of the backbone

    @model_validator(mode="after")
    def _experts_fit(self) -> AdapterParams:
        problems: list[str] = []
        if self.expert_rank == "split" and self.r % self.num_experts:
            problems.append(f"r ({self.r}) must be a multiple of num_experts ({self.num_experts}) when expert_rank is 'split'")
        if self.gate == "onehot" and self.num_experts % NUM_MODALITIES:
            problems.append(
                f"num_experts ({self.num_experts}) must be a multiple of {NUM_MODALITIES}, the number of modalities, when gate is"
                " 'onehot'; change it, or use gate: modality"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


Teacher = Literal["mean", "image", "text", "agreement"]
"""The structure that CMSA uses as target: see ``sda_core.losses.cmsa``."""


class LossParams(Section):
    """CMSA; ``teacher: none`` is InfoNCE, ``variant: reference`` is the paper's public code."""

    variant: Literal["paper", "reference"]  # reference: as in the paper's public code
    teacher: Literal[Teacher, "none"]  # modalities whose similarities are the soft targets; none: hard targets (InfoNCE)
    temperature: Positive  # divides the similarities of the loss
    teacher_temperature: Positive | None  # null: the same as temperature
    teacher_targets: (
        Annotated[float, Field(gt=1)] | None
    )  # calibrates the teacher_temperature to this number of effective targets: sda_core.losses.geometry
    center: Literal["none", "batch", "running"]  # mean to subtract first; running may collapse: sda_core.losses.geometry
    keep_base: NonNegative  # weight of the term that keeps the structure within each modality: sda_core.losses.keep
    learn_temperature: bool  # temperature is then the start value
    teacher_source: Literal["adapted", "base"]  # similarities of the trained vectors, or of the backbone alone
    detach_teacher: bool  # no gradient through the teacher
    normalize: bool  # unit vectors, so similarity is cosine
    false_negatives: Literal[
        "keep", "mask", "share"
    ]  # items of a batch with equal content: kept as negatives, excluded, or shared targets


class TrainAdapterParams(Section):
    """Phase one: adapters trained on items alone.  Each trained variant has an adapter section and a loss section."""

    variants: dict[Name, TrainedVariant]  # name: {adapter: section, loss: section}
    training: TrainingParams
    lora: AdapterParams
    moda: AdapterParams
    infonce: LossParams
    loss: LossParams

    def of(self, variant: str) -> tuple[AdapterParams, LossParams]:
        """The adapter and loss sections of a trained variant.

        Raises:
            ConfigError: no such variant.
        """
        if variant not in self.variants:
            known = ", ".join(sorted(self.variants)) or "none"
            raise ConfigError("--variant", f"unknown trained variant {variant!r}; params.train_adapter.variants has {known}")
        choice = self.variants[variant]
        return getattr(self, choice.adapter), getattr(self, choice.loss)


# ---------------------------------------------------------------------------- embeddings, index, training
class ExportParams(Section):
    """Item vectors: one pass per modality, then fusion."""

    engine: Literal["local", "ray"]  # ray: the cluster at RAY_ADDRESS, else one on this machine
    num_workers: Count  # workers of ray; with local, torchrun or accelerate set the number
    batch_size: Count  # items per pass
    shard_rows: Count  # items per block; an interrupted run resumes with the next block
    merge: bool  # merge the adapter into the base weights, one modality at a time
    compile: bool  # torch.compile, for GPUs and big shops
    fusion: Literal[
        "late_concat_pca", "concat", "mean", "image", "text"
    ]  # fusion of the two vectors: concatenation with PCA, concatenation, mean, or only one of them
    fused_dim: Count  # components of the PCA; at most the width of the concatenation and the number of fitted items
    center: bool  # subtract the mean of each modality before the scaling to unit length
    normalize: bool  # unit length
    image_weight: NonNegative  # factors of the two modalities if both are fused
    text_weight: NonNegative  # as image_weight
    balance: Literal["none", "equal_energy"]  # equal_energy: first scale both to equal variance around their means
    axis_scaling: Literal["none", "even"]  # even: of the PCA, each component divided by sqrt(its variance + mean variance)
    with_base: bool  # adapted variants: also fuse the backbone's vectors without adapter, so that adaptation loses nothing


class JointVariant(Section):
    """Item vectors of a joint pass: an item's image and text in one sequence."""

    of: Name  # zero_shot, or the variant of train_adapter whose adapter is used


class JointParams(Section):
    """Joint passes, one variant each; the other settings are those of ``export_embeddings``."""

    variants: dict[Name, JointVariant]  # name: {of: variant}


class ControlParams(Section):
    """Control vectors, one variant each; see ``sda_core.embeddings.controls``."""

    variants: Annotated[tuple[Control, ...], Distinct]  # controls to write
    seed: CountOrZero  # seed of the random and shuffled controls


class ImportedVariant(Section):
    """Imported item vectors."""

    path: Annotated[str, Field(min_length=1)]  # a parquet file, or a folder of .npy files with a list of ids; below the project


class ImportEmbeddingsParams(Section):
    """Imported item vectors, one variant each; see ``sda_core.exchange.vectors``."""

    variants: dict[Name, ImportedVariant]  # name: {path: file}
    item_column: Annotated[str, Field(min_length=1)]  # in a parquet file: the shop's ids, as in raw_item_id
    image_column: Annotated[str, Field(min_length=1)]  # image vectors
    text_column: Annotated[str, Field(min_length=1)]  # text vectors
    embedding_column: Annotated[str, Field(min_length=1)]  # one vector per item; without it the other two are fused
    max_missing_share: Share  # maximum share of items without a vector; such items get a vector of zeros

    def of(self, variant: str) -> ImportedVariant:
        """The source of an imported variant.

        Raises:
            ConfigError: no such variant.
        """
        if variant not in self.variants:
            known = ", ".join(sorted(self.variants)) or "none"
            raise ConfigError("--variant", f"unknown imported variant {variant!r}; params.import_embeddings.variants has {known}")
        return self.variants[variant]


class SearchParams(Section):
    """The FAISS index and its search settings; null: FAISS's default."""

    factory: Annotated[str, Field(min_length=1)]  # FAISS factory string, e.g. Flat, HNSW32 or IVF256,Flat
    nprobe: Count | None  # clusters to search (IVF)
    ef_search: Count | None  # candidates during the search (HNSW)


class IndexParams(SearchParams):
    """The FAISS index of item vectors."""

    recall_at: Count  # recall of this many neighbours is measured
    num_queries: Count  # items for the measurement of recall
    min_recall: Share  # the stage fails below it


Representation = Literal["id", "content", "id+content"]  # without item vectors it is always id
SequentialLoss = Literal["bce", "gbce", "sampled_softmax", "softmax"]


class FitParams(Section):
    """Settings of all trained recommenders: optimisation and early stopping on validation NDCG@10."""

    max_epochs: Count  # training ends here at the latest
    patience: Count  # evaluations without a better validation NDCG@10
    eval_every: Count  # epochs
    batch_size: Count  # training rows per step
    learning_rate: Positive  # of the optimizer
    weight_decay: NonNegative  # of the optimizer
    dtype: Literal["float32", "bfloat16"]  # dtype of matrix products in training; weights and scoring are float32


class PopParams(Section):
    """Popularity: the items with the most interactions."""

    kind: Literal["pop"]
    counts: Literal["train", "train_valid", "all"]  # splits to count; all includes the test


class NearestParams(Section):
    """Nearest items: similarity to the items of the history, without training; without vectors it is item-kNN."""

    kind: Literal["nearest"]
    representation: Representation  # similarity of items: by the users they share, by their embeddings, or both
    content_weight: Share | None  # with id+content: weight of the embeddings; null: chosen on validation NDCG@10
    axis_scaling: Literal["none", "even"]  # with content: scaling of the embeddings' principal axes, as in export_embeddings
    num_neighbors: Count  # with id: number of most similar items by users that each item keeps
    shrinkage: NonNegative  # with id: lowers the similarity of items with few users; 0: none
    max_length: Length  # number of latest items of a history that are used
    new_item_cost: Share | None  # accepted loss of validation NDCG@10 to recommend items not seen in training; null: none

    @model_validator(mode="after")
    def _weighs_two_similarities(self) -> NearestParams:
        if self.content_weight is not None and self.representation != "id+content":
            raise ValueError(f"content_weight needs representation id+content (got {self.representation}); set it to null")
        if self.new_item_cost is not None and self.representation == "id":
            raise ValueError("new_item_cost needs content to tell new items apart (representation is id); set it to null")
        return self


class SequentialParams(FitParams):
    """Settings of SASRec and BERT4Rec."""

    representation: Representation  # representation of an item: a learned vector, its projected embedding, or their sum
    hidden_size: Count  # width of the model
    num_blocks: Count  # transformer blocks
    num_heads: Count  # attention heads
    max_length: Length  # number of latest items of a history that are used
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]  # dropout of the model
    id_dropout: Annotated[float, Field(ge=0.0, lt=1.0)]  # with id+content: probability that an item has only content in a step
    new_item_cost: Share | None  # accepted loss of validation NDCG@10 to recommend items not seen in training; null: none
    loss: SequentialLoss  # loss over the negatives, or over all items (softmax)
    num_negatives: Count  # negatives of bce, gbce and sampled_softmax; softmax uses all items
    gbce_t: Share  # calibration of gbce: 0 is bce, 1 fully calibrated
    align_weight: NonNegative  # weight of the alignment of projected item vectors to the item table trained on ids; 0: none
    align_temperature: Positive  # temperature of this alignment

    @model_validator(mode="after")
    def _has_content_where_it_is_needed(self) -> SequentialParams:
        if self.id_dropout and self.representation != "id+content":
            raise ValueError(f"id_dropout needs representation id+content (got {self.representation}); set it to 0.0")
        if self.new_item_cost is not None and self.representation == "id":
            raise ValueError("new_item_cost needs content to tell new items apart (representation is id); set it to null")
        return self


class SASRecParams(SequentialParams):
    """SASRec (Kang & McAuley 2018)."""

    kind: Literal["sasrec"]
    causal: bool  # items attend to earlier items only


class BERT4RecParams(SequentialParams):
    """BERT4Rec (Sun et al. 2019)."""

    kind: Literal["bert4rec"]
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)]  # masking probability of each item in training
    last_item_mask_share: Share  # share of the training rows that mask the last item only


class BPRParams(FitParams):
    """BPR-MF (Rendle et al. 2009): ids only."""

    kind: Literal["bpr"]
    factor_size: Count  # width of user and item vectors
    embedding_regularization: NonNegative  # L2 on the factors and biases of the users and items in a batch


class VBPRParams(FitParams):
    """VBPR (He & McAuley 2016); without vectors it is BPR-MF."""

    kind: Literal["vbpr"]
    factor_size: Count  # width of the part learned from ids
    content_factor_size: Count  # width of the part from item vectors
    embedding_regularization: NonNegative  # L2 on the factors and biases of the users and items in a batch
    content_item_regularization: NonNegative  # L2 on the content factors E f of the items in a batch
    content_regularization: NonNegative  # L2 on the projection E, shared by all items
    content_bias_regularization: NonNegative  # L2 on the visual bias beta', shared by all items


class SLMRecParams(FitParams):
    """SLMRec (Tao et al. 2022); without vectors it is LightGCN."""

    kind: Literal["slmrec"]
    hidden_size: Count  # width of user and item vectors
    num_layers: CountOrZero  # layers of the graph; 0: no propagation
    embedding_regularization: NonNegative  # L2 on the user and item tables' rows in a batch
    task: Literal["fd", "fm", "fd+fm", "fac"]  # self-supervised task; see sda_core/recommenders/slmrec.py
    task_weight: NonNegative  # 0: none
    temperature: Positive  # temperature of the task
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]  # dropout of the views of fd


RecommenderParams = PopParams | NearestParams | BPRParams | VBPRParams | SLMRecParams | SASRecParams | BERT4RecParams


class TrainRecommenderParams(Section):
    """Phase two: recommenders on frozen item vectors, one section each."""

    variants: Annotated[tuple[Name, ...], Field(min_length=1), Distinct]  # those with vectors; id is always trained, see dvc.yaml
    seeds: Annotated[tuple[TrainingSeed, ...], Field(min_length=1), Distinct]  # one training per seed
    pop: PopParams
    nearest: NearestParams
    sasrec: SASRecParams
    vbpr: VBPRParams
    bert4rec: BERT4RecParams
    bpr: BPRParams
    slmrec: SLMRecParams

    def of(self, recommender: str) -> RecommenderParams:
        """One recommender's section.

        Raises:
            ConfigError: no such recommender.
        """
        sections = {name: section for name, section in self if isinstance(section, RecommenderParams)}
        if recommender not in sections:
            raise ConfigError("--recommender", f"unknown recommender {recommender!r}; known are {', '.join(sections)}")
        return sections[recommender]


# ------------------------------------------------------------------------------------ evaluation, report
class TailParams(Section):
    """The definition of long-tail items: see ``sda_core.evaluation.groups``."""

    definition: Literal["train_lt_k", "pareto", "paper"]  # by training counts, by share of the items, by all counts
    max_count: Count  # items with fewer interactions are tail (train_lt_k, paper)
    share: Share  # the least popular share of the items is tail (pareto)


class RetrievalParams(SearchParams):
    """Candidates from an index instead of the scores of all items: see ``sda_core.ranking.retrieval``."""

    depth: Count  # candidates retrieved per user; a target outside of them has the last position
    num_queries: Count  # users for the measurement of recall by exact scores

    @model_validator(mode="after")
    def _search_fits(self) -> RetrievalParams:
        if self.factory.startswith("HNSW") and self.ef_search is None:
            raise ValueError(
                f"ef_search should be set for {self.factory} (FAISS's own, 16, does not grow with depth {self.depth})"
            )
        return self


class EvaluateParams(Section):
    """Ranking and scoring of the test users' targets."""

    protocol: Literal[
        "fullrank", "uni100", "pop100"
    ]  # candidates per user: all unseen items, or 100 sampled ones (uniform or by popularity)
    cutoffs: Annotated[tuple[Count, ...], Field(min_length=1), Distinct]  # the k of Hit@k and NDCG@k
    ties: Literal["pessimistic", "mean", "optimistic"]  # position of the target among candidates with equal scores
    tail: TailParams
    negatives_seed: CountOrZero  # seed of uni100 and pop100
    bootstrap_samples: CountOrZero  # draws for the intervals; 0: no intervals
    bootstrap_seed: CountOrZero  # seed of these draws
    batch_size: Count  # users scored at once; does not affect results
    retrieval: RetrievalParams | None  # null: exact scores of all candidates

    @model_validator(mode="after")
    def _retrieval_fits(self) -> EvaluateParams:
        if self.retrieval is None:
            return self
        problems: list[str] = []
        if self.protocol != "fullrank":
            problems.append(f"retrieval searches all items, which is protocol 'fullrank' (got {self.protocol!r}); set it to null")
        if self.retrieval.depth < max(self.cutoffs):
            problems.append(
                f"retrieval.depth ({self.retrieval.depth}) should be at least the largest of cutoffs {max(self.cutoffs)}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class ReportParams(Section):
    """The report's page."""

    title: Annotated[str, Field(min_length=1)]  # heading of the page
    num_example_items: Count  # items shown with their neighbours
    num_neighbors: Count  # neighbours per item
    cutoff: Count  # cut-off of the headline table


class RuntimeParams(Section):
    """Device and processes; no stage depends on this section, because it must not change a result."""

    device: Literal["auto", "cpu", "cuda"]  # auto: a GPU if there is one
    num_threads: CountOrZero  # 0: torch's default; with several trainings at once, an equal share of the cores each
    num_trainings: Count  # processes that train recommenders at once


class Params(Section):
    """The whole of ``params.yaml``."""

    variants: Annotated[tuple[Name, ...], Field(min_length=1), Distinct]  # variants to evaluate and show, in this order
    recommenders: Annotated[
        tuple[Literal["pop", "nearest", "bpr", "vbpr", "slmrec", "sasrec", "bert4rec"], ...], Field(min_length=1), Distinct
    ]  # recommenders to train and evaluate
    dataset: Dataset
    local_files: LocalFilesParams
    download: DownloadParams
    filter: FilterParams
    fetch_images: FetchImagesParams
    items: ItemsParams
    backbone: BackboneParams
    train_adapter: TrainAdapterParams
    export_embeddings: ExportParams
    joint_embeddings: JointParams
    control_embeddings: ControlParams
    import_embeddings: ImportEmbeddingsParams
    build_index: IndexParams
    train_recommender: TrainRecommenderParams
    evaluate: EvaluateParams
    report: ReportParams
    runtime: RuntimeParams

    @model_validator(mode="after")
    def _fits_together(self) -> Params:
        problems = [*_problems_of_sections(self.model_dump(mode="json")), *_problems_of_names(self), *_problems_of_pairs(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


# ----------------------------------------------------------------------------- settings that contradict each other
# Each rule gives a line: path, value found, value expected, remedy.  The library also checks its own arguments; these rules
# report the same errors before a stage runs.
_HUB_ID = re.compile(r"[^./~][^/]*/[^/]+")
_REPOSITORY_WEIGHTS = "pretraining/"  # of the preset nano_lvlm
_PLACEHOLDER = re.compile(r"\{(\w*)\}")  # as in data/prompts.py


def _dataset_problems(section: DemoDataset | AmazonDataset) -> Iterator[str]:
    if isinstance(section, AmazonDataset):
        if section.image_archive is None and section.image_archive_sha256 is not None:
            yield "image_archive_sha256: is set, but image_archive is null; name the archive, or set the hash to null"
    elif section.mean_history_length > section.num_items / 2:
        yield (
            f"mean_history_length: should be at most half of num_items ({section.num_items}) (got {section.mean_history_length});"
            " make the shop larger or its histories shorter"
        )


def _items_problems(section: ItemsParams) -> Iterator[str]:
    for name in ("text_opening", "image_prompt"):
        unknown = [match[0] for match in _PLACEHOLDER.finditer(getattr(section, name)) if match[1] != "noun"]
        if unknown:
            yield f"{name}: has the unknown placeholder {unknown[0]}; only {{noun}} is filled in"


def _backbone_problems(section: BackboneParams) -> Iterator[str]:
    if isinstance(section, TinyQwen25VL | Nano | QwenVLCheckpoint) and section.min_pixels > section.max_pixels:
        yield f"min_pixels: should be at most max_pixels ({section.max_pixels}) (got {section.min_pixels})"
    if isinstance(section, TinyQwen25VL) and section.hidden_size % (2 * section.num_heads):
        yield (f"num_heads: should divide hidden_size ({section.hidden_size}) into an even head width (got {section.num_heads})")
    if isinstance(section, Checkpoint):
        if section.revision is not None:  # null is for local folders, and for presets that do not set it: see load_params
            yield from _revision_problems(section)
        if section.attention == "flash_attention_2" and section.dtype == "float32":
            yield "attention: flash_attention_2 needs a half-precision dtype (got float32); use dtype: bfloat16, or auto"


def _revision_problems(section: Checkpoint) -> Iterator[str]:
    is_hub_id = _HUB_ID.fullmatch(section.name) is not None and not Path(section.name).is_dir()
    if is_hub_id and section.revision is None and section.name.startswith(_REPOSITORY_WEIGHTS):
        yield (
            f"name: there is no folder {section.name} here, and the package does not hold it; get it from the repository of"
            " sda-rec (its pretraining/README.md says how), and set backbone.name to its path"
        )
    elif is_hub_id and (section.revision is None or not re.fullmatch("[0-9a-f]{40}", section.revision)):
        yield (
            f"revision: should pin a commit of {section.name}, 40 hexadecimal digits (got {section.revision!r});"
            " take it from the checkpoint's list of commits; only a local folder needs none, and there is none of that name"
        )


def _training_problems(section: TrainingParams) -> Iterator[str]:
    if section.micro_batch_size is not None and section.micro_batch_size > section.batch_size:
        yield (
            f"micro_batch_size: should be at most batch_size ({section.batch_size}) (got {section.micro_batch_size});"
            " lower it, or set it to null for one pass"
        )
    if section.vision_cache == "always" and section.sharding != "none":
        yield f"vision_cache: is 'always', but sharding is {section.sharding!r}, which allows no cache; set it to auto"


_REFERENCE_LOSS = {
    "teacher": "mean",
    "teacher_temperature": None,
    "teacher_source": "adapted",
    "detach_teacher": False,
    "normalize": False,
    "false_negatives": "keep",
    "teacher_targets": None,
    "center": "none",
    "keep_base": 0.0,
}
"""Fixed settings of the public code, which has no such options."""


def loss_problems(section: LossParams) -> Iterator[str]:
    """The contradictions within a loss section, with remedies; none for a section of a loaded params.yaml."""
    if section.variant == "reference":
        for name, value in _REFERENCE_LOSS.items():
            if getattr(section, name) != value:
                yield (
                    f"{name}: should be {json.dumps(value)} with variant 'reference', which computes what the public code does"
                    f" (got {json.dumps(getattr(section, name))}); change it, or use variant: paper"
                )
        return
    if section.teacher == "none" and section.teacher_source == "base":
        yield "teacher_source: is 'base', but teacher is 'none', which uses no vectors; set it to adapted, or set a teacher"
    if section.teacher == "none" and section.teacher_targets is not None:
        yield "teacher_targets: is set, but teacher is 'none', which has one target per row; set it to null, or set a teacher"
    if section.teacher_targets is not None and section.teacher_temperature is not None:
        yield (
            f"teacher_targets: finds the teacher's temperature, but teacher_temperature is {section.teacher_temperature:g};"
            " set one of them to null"
        )


def _export_problems(section: ExportParams) -> Iterator[str]:
    fuses_both = section.fusion in ("late_concat_pca", "concat", "mean")
    if fuses_both and section.image_weight == section.text_weight == 0:
        yield "image_weight: is 0, and so is text_weight, which leaves nothing to fuse; raise one of them"
    if not fuses_both and section.balance != "none":
        yield f"balance: is {section.balance!r}, but fusion is {section.fusion!r}, which takes one modality; set it to none"
    if section.axis_scaling != "none" and section.fusion != "late_concat_pca":
        yield (
            f"axis_scaling: is {section.axis_scaling!r}, but fusion is {section.fusion!r}, which has no components;"
            " set it to none, or fusion to late_concat_pca"
        )
    if section.with_base and section.fusion not in ("late_concat_pca", "concat"):
        yield (
            f"with_base: is true, but fusion is {section.fusion!r}, which has no room for further vectors;"
            " set it to false, or fusion to late_concat_pca or concat"
        )


def _search_problems(section: SearchParams) -> Iterator[str]:
    # FAISS ends the process; 0 is valid after PCA (the width of the vectors stays) and Pad
    for part in section.factory.split(","):
        if (zero := re.search(r"[A-Za-z_]0+(?![0-9])", part)) and not re.match(r"PCA|Pad", part):
            yield f"factory: has {part}, but the number in {zero[0]} should be at least 1 (got {section.factory!r})"
    for name, kinds in (("nprobe", ("IVF", "IMI")), ("ef_search", ("HNSW",))):
        value = getattr(section, name)
        if value is not None and not any(kind in section.factory for kind in kinds):
            yield f"{name}: is {value}, but an index of the kind {section.factory!r} has no such setting; set it to null"


def _sequential_problems(section: SASRecParams | BERT4RecParams) -> Iterator[str]:
    if section.hidden_size % section.num_heads:
        yield f"hidden_size: should be a multiple of num_heads ({section.num_heads}) (got {section.hidden_size})"


_RULES: tuple[tuple[str, Any, Callable[[Any], Iterator[str]]], ...] = (
    ("dataset", Dataset, _dataset_problems),
    ("items", ItemsParams, _items_problems),
    ("backbone", BackboneParams, _backbone_problems),
    ("train_adapter.training", TrainingParams, _training_problems),
    ("train_adapter.infonce", LossParams, loss_problems),
    ("train_adapter.loss", LossParams, loss_problems),
    ("export_embeddings", ExportParams, _export_problems),
    ("build_index", IndexParams, _search_problems),
    ("train_recommender.sasrec", SASRecParams, _sequential_problems),
    ("train_recommender.bert4rec", BERT4RecParams, _sequential_problems),
    ("evaluate.retrieval", RetrievalParams | None, lambda section: iter(()) if section is None else _search_problems(section)),
)
"""The rules of each section, by path."""


def _problems_of_sections(data: Any) -> Iterator[str]:
    """The contradictions within each valid section, even if other sections are invalid."""
    for path, kind, rule in _RULES:
        section: Any = data
        for key in path.split("."):
            section = cast("dict[str, Any]", section).get(key) if isinstance(section, dict) else None
        try:
            checked = TypeAdapter(kind).validate_json(json.dumps(section, default=_plain))
        except (ValidationError, TypeError):
            continue  # already reported
        yield from (f"{path}.{problem}" for problem in rule(checked))


def _problems_of_names(params: Params) -> Iterator[str]:
    """Problems of variant names: each variant is made in exactly one way, and every used variant exists."""
    made, controls = params.train_adapter.variants, params.control_embeddings.variants
    joint, imported = params.joint_embeddings.variants, params.import_embeddings.variants
    known = {"id", "zero_shot", *made, *joint, *controls, *imported}
    unknown = [name for name in params.variants if name not in known]
    if unknown:
        yield f"variants: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}"
    trained = params.train_recommender.variants
    unknown = [name for name in trained if name not in known - {"id"}]
    if unknown:
        yield (
            f"train_recommender.variants: unknown {', '.join(unknown)}; known are {', '.join(sorted(known - {'id'}))}"
            " (id is always trained)"
        )
    untrained = [name for name in params.variants if name not in {"id", *trained}]
    if untrained:
        yield f"train_recommender.variants: misses {', '.join(untrained)}, which variants has"
    reserved = {"id", "zero_shot", *get_args(Control)} & set(made)
    if reserved:
        yield _reserved("train_adapter", reserved, "made without training")
    reserved = {"id", "zero_shot", *get_args(Control), *made} & set(joint)
    if reserved:
        yield _reserved("joint_embeddings", reserved, "made without a joint pass")
    for name, section in joint.items():
        if section.of not in {"zero_shot", *made}:
            bases = ", ".join(sorted({"zero_shot", *made}))
            yield f"joint_embeddings.variants.{name}.of: unknown variant {section.of}; known are {bases}"
    reserved = {"id", "zero_shot", *get_args(Control), *made, *joint} & set(imported)
    if reserved:
        yield _reserved("import_embeddings", reserved, "made by the pipeline itself")


def _reserved(section: str, names: Iterable[str], reason: str) -> str:
    """The problem of names that belong to other variants."""
    found = sorted(names)
    are = "are reserved names" if len(found) > 1 else "is a reserved name"
    return f"{section}.variants: {', '.join(found)} {are} ({reason}); choose another"


def _problems_of_pairs(params: Params) -> Iterator[str]:
    """Contradictions between sections."""
    backbone, training = params.backbone, params.train_adapter.training
    oracles = [name for name in params.control_embeddings.variants if name in get_args(Oracle)]
    if oracles and not isinstance(params.dataset, DemoDataset):
        yield (
            f"control_embeddings.variants: has {', '.join(oracles)}, for which only the built-in shop has the true attributes"
            " (dataset.source is 'amazon'); leave out every oracle"
        )
    max_pixels = backbone.max_pixels if isinstance(backbone, TinyQwen25VL | Nano | QwenVLCheckpoint) else 0
    if max_pixels > params.fetch_images.stored_pixels:
        yield (
            f"backbone.max_pixels: {max_pixels} is more than fetch_images.stored_pixels"
            f" ({params.fetch_images.stored_pixels}), so stored images would be enlarged again; raise the latter"
        )
    if isinstance(backbone, Checkpoint) and backbone.attention == "flash_attention_2" and params.runtime.device == "cpu":
        yield "backbone.attention: flash_attention_2 needs a GPU, but runtime.device is 'cpu'; set it to auto"
    if training.vision_cache == "always" and training.sharding == "none":
        where = "train_adapter.training.vision_cache: is 'always'"
        if not isinstance(backbone, TinyQwen25VL | Nano | Qwen2VL | Qwen25VL):
            yield f"{where}, but a backbone of the kind {backbone.kind!r} cannot run its vision tower by itself; set it to auto"
        for name, chosen in params.train_adapter.variants.items():
            adapter = params.train_adapter.lora if chosen.adapter == "lora" else params.train_adapter.moda
            if adapter.targets == "language_and_vision":
                targets = f"train_adapter.{chosen.adapter}.targets"
                yield f"{where}, but variant {name} adapts the vision tower ({targets}); set it to auto"
    yield from _joint_problems(params)
    if params.report.cutoff not in params.evaluate.cutoffs:
        yield f"report.cutoff: {params.report.cutoff} is not among evaluate.cutoffs {list(params.evaluate.cutoffs)}"


def _joint_problems(params: Params) -> Iterator[str]:
    """Settings that a joint pass does not support."""
    joint = params.joint_embeddings.variants
    if not joint:
        return
    if isinstance(params.backbone, CLIP | SigLIP):
        yield (
            f"joint_embeddings.variants: a joint pass needs one decoder for image and text, and a backbone of the kind"
            f" {params.backbone.kind!r} has a tower for each; leave joint variants out, or use another backbone"
        )
    for name, section in joint.items():
        chosen = params.train_adapter.variants.get(section.of)
        if chosen is None:
            continue
        adapter = params.train_adapter.lora if chosen.adapter == "lora" else params.train_adapter.moda
        if adapter.targets == "language_and_vision" and adapter.gate != "uniform" and adapter.num_experts > 1:
            yield (
                f"joint_embeddings.variants.{name}: a joint pass mixes the modalities, and the adapter of {section.of} changes"
                f" the vision tower by the modality; set train_adapter.{chosen.adapter}.targets to language,"
                " or its gate to uniform"
            )
    trained = [name for name in params.train_recommender.variants if name in joint]
    if trained and "slmrec" in params.recommenders:
        yield (
            f"recommenders: slmrec takes the embeddings of images and of texts, and {', '.join(trained)} has one embedding per"
            " item; leave slmrec or the joint variants out"
        )


def _tags(union: Any) -> frozenset[str]:
    """The allowed values of a union's discriminator."""
    sections, field = get_args(union)
    tags = (section.model_fields[field.discriminator].annotation for section in get_args(sections))
    return frozenset(tag for literal in tags for tag in get_args(literal))


_TAGS = _tags(Dataset) | _tags(BackboneParams)


def _describe(error: dict[str, Any]) -> str:
    """One problem as ``path: expected value (got value)``."""
    # pydantic adds the discriminator's value to the path of a union; the user's file has no such level.
    path = ".".join(str(part) for part in error["loc"] if part not in _TAGS)
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if message.startswith("input "):
        message = message.removeprefix("input ")
    kind = error["type"]
    if kind.startswith("union_tag_"):  # the field that decides which params a section has
        told = error["ctx"]
        field = f"{path}.{told['discriminator']}".replace("'", "")
        if kind == "union_tag_not_found":
            return f"{field}: missing"
        return f"{field}: should be one of {told['expected_tags']} (got {told['tag']!r})"
    if kind in ("too_short", "string_too_short"):
        message = "should not be empty"  # every minimum is 1
    if kind == "extra_forbidden" and re.fullmatch(r"train_recommender\.\w+\.seed", path):
        return f"{path}: is now the list train_recommender.seeds; `sda upgrade` moves it (got {error['input']!r})"
    if kind == "extra_forbidden":
        return f"{path}: unknown parameter"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "value_error":
        return " | ".join(f"{path}: {line}" if path else line for line in message.split("\n"))
    found = repr(error["input"])
    return f"{path}: {message} (got {found if len(found) <= 80 else found[:77] + '...'})"


def _plain(value: Any) -> str:
    """Convert dates to texts: a day without quotes is a date in YAML."""
    if type(value) is date:
        return value.isoformat()
    raise TypeError(type(value).__name__)


def _first_line(problem: object) -> str:
    return str(problem).strip().split("\n")[0]


def _not_text(data: Any, path: str = "") -> Iterator[str]:
    """The paths of texts that cannot be written as UTF-8."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(data, dict):
        pairs = cast("dict[Any, Any]", data).items()
    elif isinstance(data, list):
        pairs = enumerate(cast("list[Any]", data))
    if isinstance(data, str) and any("\ud800" <= character <= "\udfff" for character in data):
        yield path or "the file"
    for key, value in pairs:
        yield from _not_text(value, f"{path}.{key}" if path else str(key))


def _yaml_problem(error: YAMLError) -> str:
    """Describe the problem of a YAML file, with its line."""
    problem: Any = getattr(error, "problem", None)  # of a marked error
    mark: Any = getattr(error, "problem_mark", None)
    if not problem:
        return _first_line(error)
    return _first_line(problem) if mark is None else f"line {mark.line + 1}: {_first_line(problem)}"


def parse_params(data: Any, where: str) -> Params:
    """Check plain data against :class:`Params`.

    Args:
        data: the result of the YAML parser.
        where: the file's name, for messages.

    Raises:
        ConfigError: one line with all problems, each with its path.
    """
    try:
        if wrong := next(_not_text(data), None):
            raise ConfigError(where, f"{wrong}: holds half of a surrogate pair, which is not text", "write the character itself")
        # Via JSON, because pydantic's strict mode then accepts a list for a tuple, and is otherwise unchanged.
        return Params.model_validate_json(json.dumps(data, default=_plain))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # pydantic counts the valid entries only, so a list of one wrong entry is too short as well.
        wrong_within = {e["loc"][:-1] for e in errors}
        problems = [_describe(dict(e)) for e in errors if not (e["type"] == "too_short" and e["loc"] in wrong_within)]
        if not any(e["type"] == "value_error" and not e["loc"] for e in errors):
            problems += _problems_of_sections(data)  # the validators of the whole did not run, so these are not reported yet
        raise ConfigError(where, " | ".join(problems)) from None
    except TypeError as error:  # a date, a set, a non-string key: YAML has more types than JSON
        raise ConfigError(where, f"holds a value of a type that params do not have: {error}") from None
    except (ValueError, RecursionError) as error:  # an anchor within itself, thousands of nested lists
        raise ConfigError(where, f"holds a value that params cannot have: {_first_line(error)}") from None


def load_params(path: Path) -> Params:
    """Read and check a params file.

    Raises:
        ConfigError: the file is missing, is not YAML, does not match :class:`Params`, or does not pin a checkpoint's revision.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except FileNotFoundError:
        advice = "restore it, or pass the project folder with --root" if path.name == "params.yaml" else "correct --params"
        raise ConfigError(str(path), "no such file", advice) from None
    except IsADirectoryError:
        raise ConfigError(str(path), "is a folder, not a file", "name a file, or move the folder away") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        data: Any = YAML(typ="safe", pure=True).load(text)  # pyright: ignore[reportUnknownMemberType]
    except YAMLError as error:
        raise ConfigError(str(path), f"is not valid YAML: {_yaml_problem(error)}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of nested brackets
        raise ConfigError(str(path), f"cannot be read as YAML: {_first_line(error)}") from None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else "a list" if isinstance(data, list) else repr(data)[:60]
        raise ConfigError(str(path), f"should be a mapping of sections (got {found})", "restore it, for example from Git")
    params = parse_params(data, str(path))
    if isinstance(params.backbone, Checkpoint):
        for problem in _revision_problems(params.backbone):
            raise ConfigError(str(path), f"backbone.{problem}")
    return params
