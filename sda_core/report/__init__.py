"""The report of a run: ``collect`` reads the artifacts into plain data, ``render`` makes the HTML page.  No torch."""

from sda_core.report.collect import collect
from sda_core.report.examples import example_items
from sda_core.report.experiments import read_experiments
from sda_core.report.model import ReportData
from sda_core.report.page import render

__all__ = ["ReportData", "collect", "example_items", "read_experiments", "render"]
