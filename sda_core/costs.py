"""Costs of the stages of a run: seconds, processor time, memory.

Costs differ from run to run, so they are not part of any output of the pipeline: equal runs have equal outputs.  Every
successful stage appends one JSON line to a file that Git and DVC ignore (``Workspace.costs``).  If that fails, a warning is
logged and the stage still succeeds.  Stages may run in parallel, so a line is appended in one write.  The process that fills
the file renames it to ``*.old.jsonl``, replacing the older one, so there are at most two files of about ``512 KiB``.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, NonNegativeFloat, PositiveInt, ValidationError

from sda_core import __version__
from sda_core.errors import ArtifactError

_log = logging.getLogger(__name__)

_MAX_BYTES = 512 << 10
_MAX_COUNTS, _MAX_CHARS = 40, 200  # limits of a line, which is appended in one write
_MIB = 1 << 20

STAGES = (
    "download", "filter", "fetch_images", "train_adapter", "export_embeddings", "control_embeddings", "import_embeddings",
    "build_index", "train_recommender", "draw_negatives", "evaluate", "report",
)  # fmt: skip
"""The stages in the order in which they run."""

_UNITS = {
    "rows_read": "rows", "num_users": "users", "items": "items", "num_items": "items",
    "steps of this run": "steps", "steps": "steps", "epochs": "epochs",
}  # fmt: skip
"""The unit of each count; the speed of a stage is computed from its first count in this order."""


# -------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Beginning:
    """A starting point: wall-clock date, monotonic clock, and the processor time used before."""

    started: datetime
    clock: float
    cpu_seconds: float


def beginning_now() -> Beginning:
    """A starting point at the current time."""
    return Beginning(datetime.now(UTC), time.perf_counter(), _cpu_seconds())


def beginning_at(clock: float) -> Beginning:
    """The start of this process, so that imports are included.

    Args:
        clock: ``time.perf_counter()``, read as early as possible.
    """
    return Beginning(datetime.now(UTC) - timedelta(seconds=time.perf_counter() - clock), clock, 0.0)


class Run(BaseModel):
    """The cost of one run of a stage.

    Attributes:
        stage: name as in ``STAGES``.
        variant: the variant, if the stage has one.
        recommender: the recommender, if a single one was trained.
        started: start time in UTC.
        seconds: wall-clock time.
        cpu_seconds: processor time of the process and its finished child processes.
        peak_mib: peak memory of the process; None if the system does not report it.
        child_peak_mib: peak memory of the largest child process; None without one.
        gpu_peak_mib: peak memory allocated by torch on the GPU; None without a GPU.
        counts: the counts that the stage reports at its end.
        cores: number of cores available to the process.
        threads: number of torch's threads; None if torch was not imported.
        processes: number of processes of the launch; seconds and memory are those of the first one.
        cpu: name of the processor.
        gpu: name of the GPU; None if none was used.
        version: version of sda.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    stage: str
    variant: str | None
    recommender: str | None
    started: AwareDatetime
    seconds: NonNegativeFloat
    cpu_seconds: NonNegativeFloat
    peak_mib: NonNegativeFloat | None
    child_peak_mib: NonNegativeFloat | None
    gpu_peak_mib: NonNegativeFloat | None
    counts: dict[str, int | float | str]
    cores: PositiveInt
    threads: PositiveInt | None
    processes: PositiveInt
    cpu: str
    gpu: str | None
    version: str

    @property
    def whose(self) -> str:
        """Variant, and recommender if it was a single one; empty for a stage that runs once."""
        return "/".join(name for name in (self.variant, self.recommender) if name is not None)

    @property
    def ended(self) -> datetime:
        """The end of the run."""
        return self.started + timedelta(seconds=self.seconds)

    @property
    def largest_mib(self) -> float | None:
        """Peak memory of the largest process."""
        known = [peak for peak in (self.peak_mib, self.child_peak_mib) if peak is not None]
        return max(known, default=None)

    @property
    def speed(self) -> tuple[float, str] | None:
        """Units per second with the name of the unit; None without a suitable count."""
        for name, unit in _UNITS.items():
            value = self.counts.get(name)
            if isinstance(value, int | float):
                return (value / self.seconds, unit) if value > 0 and self.seconds > 0 else None
        return None

    @property
    def machine(self) -> str:
        """A short description of the machine."""
        parts = [self.cpu, f"{self.cores} {'core' if self.cores == 1 else 'cores'}"]
        return ", ".join(parts if self.gpu is None else [*parts, self.gpu])


def measure(begin: Beginning, stage: str, counts: Mapping[str, object]) -> Run:
    """The cost from a starting point until now.

    Args:
        begin: starting point of the stage.
        stage: its name, with dashes or underscores.
        counts: the counts reported at its end, including ``variant`` and ``recommender`` if it has them.
    """
    variant, recommender = (counts.get(name) for name in ("variant", "recommender"))
    gpu, gpu_peak_mib, threads = _torch()
    return Run(
        stage=stage.replace("-", "_"),
        variant=None if variant is None else _plain(str(variant)),
        recommender=None if recommender is None else _plain(str(recommender)),
        started=begin.started,
        seconds=round(time.perf_counter() - begin.clock, 3),
        cpu_seconds=round(max(_cpu_seconds() - begin.cpu_seconds, 0.0), 3),
        peak_mib=_own_peak_mib(),
        child_peak_mib=_rusage_peak_mib("RUSAGE_CHILDREN") or None,
        gpu_peak_mib=gpu_peak_mib,
        counts={_plain(name): _count(value) for name, value in list(counts.items())[:_MAX_COUNTS]},
        cores=_num_cores(),
        threads=threads,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        cpu=_plain(_cpu_name()),
        gpu=gpu,
        version=__version__,
    )


def _plain(text: str) -> str:
    """Shorten a text and remove lone surrogates, which unusual paths contain."""
    return text[:_MAX_CHARS].encode("utf-8", "replace").decode("utf-8")


def _count(value: object) -> int | float | str:
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return _plain(str(value))


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # own and children's, user and system


# psutil cannot replace this: it has no peak memory on Linux, no peak of child processes, and no name of the processor.
def _own_peak_mib() -> float | None:
    """Peak memory of this process; on Linux ``getrusage`` also counts the parent's memory at the fork, ``VmHWM`` does not."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    return _rusage_peak_mib("RUSAGE_SELF")


def _rusage_peak_mib(whose: str) -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(getattr(resource, whose)).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / _MIB, 1)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown processor"


def _torch() -> tuple[str | None, float | None, int | None]:
    """Name of the used GPU, its peak memory, and torch's threads; torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None, None, None
    if not torch.cuda.is_initialized():
        return None, None, torch.get_num_threads()
    peak_mib = round(torch.cuda.max_memory_allocated() / _MIB, 1)
    return torch.cuda.get_device_name(), peak_mib, torch.get_num_threads()


# ---------------------------------------------------------------------------------------------------- keeping
def keep(run: Run, path: Path) -> None:
    """Append a run to the file; a failure is only logged.

    Args:
        run: the run.
        path: path of the file; its folder is created, but not the folder's parent.
    """
    line = run.model_dump_json().encode() + b"\n"
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("ab+", buffering=0) as handle:
            if handle.seek(0, os.SEEK_END):
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":  # an incomplete line of a full disk or a killed process
                    line = b"\n" + line
            if handle.write(line) != len(line):
                raise OSError("the disk is full")
            end = handle.tell()
        if end // _MAX_BYTES != (end - len(line)) // _MAX_BYTES:  # exactly one writer crosses the limit
            path.replace(_older(path))
    except OSError as error:
        _log.warning("%s: the cost of %s was not recorded (%s)", path, run.stage, error)


def _older(path: Path) -> Path:
    return path.with_suffix(f".old{path.suffix}")


def read(path: Path) -> list[Run]:
    """All recorded runs, oldest first; an invalid line is skipped with a warning.

    Raises:
        ArtifactError: the file exists but cannot be opened.
    """
    found: list[Run] = []
    for file in (_older(path), path):
        try:
            lines = file.read_bytes().split(b"\n")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ArtifactError(
                str(file), f"cannot be read ({error.strerror})", "delete it; the next runs make it again"
            ) from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found.append(Run.model_validate_json(line))
            except ValidationError:
                _log.warning("%s, line %d: is not a stage's cost and is skipped", file, number)
    return found


# ---------------------------------------------------------------------------------------------------- showing
@dataclass(frozen=True)
class Latest:
    """The last run of a stage; ``is_part`` if it ran inside another one, whose cost includes it."""

    run: Run
    is_part: bool


def latest(runs: Sequence[Run], variants: Sequence[str], recommenders: Sequence[str]) -> tuple[Latest, ...]:
    """The last run of every stage, variant and recommender, in the order of the pipeline.

    Args:
        runs: the runs, oldest first.
        variants: variants to include.
        recommenders: recommenders to include.
    """
    last = {(run.stage, run.variant, run.recommender): run for run in sorted(runs, key=lambda run: run.started)}
    places = [{name: place for place, name in enumerate((None, *names))} for names in (variants, recommenders)]
    shown = [run for (stage, v, r), run in last.items() if stage in STAGES and v in places[0] and r in places[1]]
    shown.sort(key=lambda run: (STAGES.index(run.stage), places[0][run.variant], places[1][run.recommender]))
    return tuple(Latest(run, _is_part(run, runs)) for run in shown)


def read_latest(path: Path, variants: Sequence[str], recommenders: Sequence[str]) -> tuple[Latest, ...]:
    """:func:`latest` of a file.

    Raises:
        ArtifactError: the file has no run, or cannot be read.
    """
    rows = latest(read(path), variants, recommenders)
    if not rows:
        raise ArtifactError(str(path), "has no record of a stage", "run `dvc repro`; what is up to date does not run")
    return rows


def _is_part(run: Run, runs: Iterable[Run]) -> bool:
    return run.recommender is not None and any(
        (whole.stage, whole.variant, whole.recommender) == (run.stage, run.variant, None)
        and whole.started <= run.started
        and run.ended <= whole.ended
        for whole in runs
    )


@dataclass(frozen=True)
class Total:
    """Total of all stages, parts counted once: the sum of the seconds, and the maximum of the memory of one process."""

    seconds: float
    cpu_seconds: float
    largest_mib: float | None
    machines: tuple[str, ...]


def total(rows: Sequence[Latest]) -> Total:
    """The total of the runs returned by :func:`latest`."""
    whole = [row.run for row in rows if not row.is_part]
    return Total(
        seconds=sum(run.seconds for run in whole),
        cpu_seconds=sum(run.cpu_seconds for run in whole),
        largest_mib=max((run.largest_mib for run in whole if run.largest_mib is not None), default=None),
        machines=tuple(dict.fromkeys(run.machine for run in whole)),
    )


def table(rows: Sequence[Latest]) -> Iterator[str]:
    """The lines of ``sda costs``; a run inside another run is indented and not added to the total."""
    yield f"{'stage':<20} {'variant':<12} {'ended (UTC)':<16} {'seconds':>9} {'CPU s':>9} {'peak MiB':>9}  speed"
    for row in rows:
        run = row.run
        name, whose = (f"  {run.recommender}", run.variant or "") if row.is_part else (run.stage, run.whose)
        speed = "" if run.speed is None else f"{run.speed[0]:,.1f} {run.speed[1]}/s"
        line = f"{name:<20} {whose:<12} {run.ended:%Y-%m-%d %H:%M}"
        yield f"{line} {run.seconds:9.1f} {run.cpu_seconds:9.1f} {_or_nothing(run.largest_mib):>9}  {speed}".rstrip()
    whole = total(rows)
    yield f"{'total':<50} {whole.seconds:9.1f} {whole.cpu_seconds:9.1f} {_or_nothing(whole.largest_mib):>9}"
    yield f"On {'; '.join(whole.machines)}. Memory is the peak of the largest process."


def _or_nothing(mib: float | None) -> str:
    return "" if mib is None else f"{mib:.0f}"


def as_json(rows: Sequence[Latest]) -> str:
    """All fields of the runs, and their total."""
    runs = [
        row.run.model_dump(mode="json")
        | {"is_part": row.is_part}
        | ({} if row.run.speed is None else {f"{row.run.speed[1]}_per_second": round(row.run.speed[0], 3)})
        for row in rows
    ]
    return json.dumps({"runs": runs, "total": asdict(total(rows))}, indent=2, ensure_ascii=False)
