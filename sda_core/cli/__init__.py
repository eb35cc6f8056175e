"""The command line: what stages share (``stage``), the commands that only read, and the console script ``sda`` (``app``).

Importing it sets up the process of a command, which ``import sda_core`` alone does not.
"""

from sda_core.cli import process  # first of all imports of a command, for its clock begins there

__all__ = ["main", "process"]


def main() -> None:
    """Entry point of the console script ``sda``."""
    from sda_core.cli.app import run

    run()
