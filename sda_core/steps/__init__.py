"""The longer stages' bodies: which parts are up to date, what runs in which process, and what is kept for a restart.

A stage's file reads its params and calls its step here; the method itself is in the rooms that the steps call.
"""
