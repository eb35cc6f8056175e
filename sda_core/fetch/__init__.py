"""Fetch and check raw files and images from addresses, folders and archives.

Nothing here imports torch or parses the contents of raw files, which is done in :mod:`sda_core.data`.
"""
