"""Experiments: one script for each question of the paper.

Some use a finished run of the pipeline, others build their own; the help of each says which.  Those that train resume after an
interruption.  Most write a table with intervals to ``experiments/results``, which ``sda report --experiments`` shows.
"""
