"""How the process of a stage or of ``sda`` runs: when it began, how its threads wait, when garbage is collected."""

import gc
import os
import time

STARTED = time.perf_counter()  # what is imported from here on is part of what a stage costs

# Before torch starts its threads: they sleep while they wait.  By default they spin, and where anything else wants the
# same cores, small models become many times slower (measured: 12 s a step instead of 1.7 s, beside one busy process).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Importing torch and transformers makes some hundred thousand objects, which stay.  By default the collector looks at them
# again and again (a tenth of a start's time); cycles are still found, later.
gc.set_threshold(100_000, 20, 20)
