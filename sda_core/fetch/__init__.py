"""Bytes from elsewhere: raw files and images from addresses, folders and archives, checked before anything relies on them.

Nothing here imports torch, and nothing here reads what a raw file says: that is :mod:`sda_core.data`.
"""
