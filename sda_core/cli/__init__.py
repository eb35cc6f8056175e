"""The command line: code shared by stages (``stage``), the read-only commands, and the console script ``sda`` (``app``).

Importing it sets up the process of a command; ``import sda_core`` alone does not.
"""

import sys

from sda_core.cli import process  # must be the first import of a command, because it starts the clock

__all__ = ["main", "process"]


def main() -> None:
    """Entry point of the console script ``sda``."""
    from sda_core.cli import extra

    if lacking := extra.missing():
        sys.stderr.write(f"sda: error: not installed: {', '.join(lacking)}; {extra.ADVICE}\n")
        raise SystemExit(1)
    from sda_core.cli.app import run

    run()
