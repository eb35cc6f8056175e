"""What is how fast: one script for each comparison.

A script runs both sides in one go and prints ratios.  The results are in ``bench/README.md``.
"""
