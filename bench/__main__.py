"""The comparisons by name: ``python -m bench moda_step --rounds 5``."""

from sda_core.cli.scripts import run_scripts

run_scripts("bench")
