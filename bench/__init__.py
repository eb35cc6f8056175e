"""Benchmarks: one script for each comparison.

A script measures both sides in one run and prints ratios.  The results are in ``bench/README.md``.
"""
