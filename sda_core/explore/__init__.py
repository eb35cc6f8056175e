"""Questions to a finished run, asked by hand: items near a text or an item, and recommendations for a history.

:class:`~sda_core.explore.finished_run.FinishedRun` answers them, :mod:`sda_core.explore.page` shows them in a browser, and
``sda search`` prints the items near a text.  Nothing here trains, writes, or is used by a stage.
"""
