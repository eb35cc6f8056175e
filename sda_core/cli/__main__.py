"""``python -m sda_core.cli`` is the console script ``sda``."""

from sda_core.cli import main

main()
