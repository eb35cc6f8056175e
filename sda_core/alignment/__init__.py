"""Phase one: the adapter is trained on items alone, by aligning their images with their texts.

Choices:

* AdamW (Loshchilov & Hutter 2019; betas 0.9 and 0.999), linear warm-up, then a constant rate: the paper (SDA, arXiv
  2512.06883) gives 2e-4, and its public code builds a schedule that it never steps.  Weight decay spares the gate, the
  modality embeddings and a learned temperature.
* A batch is a slice of a seeded permutation of the items, one permutation an epoch; what does not fill a batch waits
  for the next permutation.  Items that show no image cannot be aligned and are left out.
* ``batch_size`` is the global batch: every process takes its slice of it, and the loss is that of all rows
  (``sda_core.losses.gather``).  With a ``micro_batch_size`` the slice goes through the model in chunks, with gradient
  caching (``sda_core.losses.grad_cache``).
* Image and text pass one after the other through the shared layers.  The loss is taken on detached vectors, and each
  pass is then run backward with its own gradient: the same sum as one backward call, but the image's graph is freed
  before the texts' is walked, and each modality's share of the gradient can be seen.
* Every draw is seeded by the step and, with a ``micro_batch_size`` or several processes, by the modality and the number
  of the chunk in the global batch.  A resumed run on one process is the run it resumes, bit for bit.  With a
  ``micro_batch_size`` the chunks and their draws do not depend on the number of processes: then a run on any number, and
  one resumed on another number, differ by the rounding of sums only.  Without one they also differ in dropout.
* Inputs are made one chunk ahead in a thread, because decoding and tokenising would keep a GPU waiting.
* A mistake that one process finds ends all of them with its message.
"""

from __future__ import annotations

from sda_core.alignment.inputs import Encoder, batch_rows
from sda_core.alignment.sharding import home
from sda_core.alignment.state import StepRecord
from sda_core.alignment.training import learning_rate, train_adapter

__all__ = ["Encoder", "StepRecord", "batch_rows", "home", "learning_rate", "train_adapter"]
