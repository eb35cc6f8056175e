"""The paper's questions, one script each.

Each takes a workspace, resumes where it was stopped, and writes a table with intervals to ``experiments/results``, which
``sda report --experiments`` shows.
"""
