"""The bodies of the longer stages: one module per stage, with what is up to date, what runs where, what is kept for a restart.

A stage's file reads its params and calls its step here; the method itself is in the rooms that the steps call.
"""
