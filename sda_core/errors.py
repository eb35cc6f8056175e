"""Everything SDA raises on purpose.

::

    SDAError
    ├── ConfigError     params.yaml, a preset or a command-line option is wrong
    ├── ArtifactError   a file of the pipeline is missing, damaged or of another schema
    ├── DownloadError   a source cannot be reached, or what came back is not the data
    ├── DataError       the data was read, but cannot be used as asked
    └── TrainingError   a training run cannot go on (non-finite loss, nothing to adapt, ...)

A message is one line: where, got, expected, what to do.  The stages print it and exit with 1; every other
exception is a bug and keeps its traceback.
"""


class SDAError(Exception):
    """Base of all errors that a user can mend.

    Args:
        where: the file, parameter or stage concerned, e.g. ``"params.yaml: filter.min_user_interactions"``.
        problem: what was found and what was expected.
        advice: what to do about it; optional where the problem says it.

    Attributes:
        known_to_all: every process of the launch raises this error, so it is enough that process 0 says it.
    """

    known_to_all = False

    def __init__(self, where: str, problem: str, advice: str = "") -> None:
        self.where = where
        self.problem = problem
        self.advice = advice
        text = f"{where}: {problem}"
        if advice:
            text += f"; {advice}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Keep the three parts when the error crosses a process border."""
        return (type(self), (self.where, self.problem, self.advice))


class ConfigError(SDAError):
    """``params.yaml``, a preset or a command-line option is wrong."""


class ArtifactError(SDAError):
    """A file of the pipeline is missing, damaged or has another schema than its reader expects."""


class DownloadError(SDAError):
    """A source cannot be reached, or what came back is not the data it should be."""


class DataError(SDAError):
    """The data was read, but it cannot be used as asked (empty after filtering, too many bad lines)."""


class TrainingError(SDAError):
    """A training run cannot go on: non-finite loss, nothing to adapt, no user left to train on."""
