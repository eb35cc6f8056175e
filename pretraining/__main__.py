"""Run a step by its name: ``python -m pretraining train``."""

from sda_core.cli.scripts import run_scripts

run_scripts("pretraining")
