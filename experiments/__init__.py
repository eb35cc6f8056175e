"""Experiments: one script for each question of the paper.

Each uses a finished run, resumes after an interruption, and writes a table with intervals to ``experiments/results``, which
``sda report --experiments`` shows.
"""
