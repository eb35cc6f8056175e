"""Set up the process of a stage or of ``sda``: start of the clock, waiting of threads, garbage collection."""

import gc
import os
import time

STARTED = time.perf_counter()  # imports after this line count as cost of the stage

# Before torch starts its threads: let them sleep while they wait.  By default they spin, and if another process uses the
# same cores, small models become many times slower (measured: 12 s per step instead of 1.7 s, beside one busy process).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Importing torch and transformers creates several hundred thousand permanent objects.  By default the collector scans them
# repeatedly (a tenth of the start-up time); cycles are still collected, but later.
gc.set_threshold(100_000, 20, 20)
