"""Explore a finished run: items near a text or an item, and recommendations for a history.

:class:`~sda_core.explore.finished_run.FinishedRun` computes the results, :mod:`sda_core.explore.page` shows them in a browser,
and ``sda search`` prints the items near a text.  Nothing here trains, writes files, or is used by a stage.
"""
