"""The bodies of the longer stages, one module each: what to skip, which process does what, and how to resume.

A stage's file reads its params and calls its step here; the methods are in the packages that the steps call.
"""
