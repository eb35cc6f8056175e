"""The experiments by name: ``python -m experiments sweep --name temperature ...``."""

import logging

from sda_core import log
from sda_core.cli.scripts import run_scripts

log.configure()
logging.getLogger("experiments").setLevel(logging.INFO)
run_scripts("experiments")
