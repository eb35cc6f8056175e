"""Phase one: train the adapter on items alone, by aligning their images with their texts.

Design:

* AdamW (Loshchilov & Hutter 2019; betas 0.9 and 0.999), linear warm-up, then a constant rate: the paper (SDA, arXiv
  2512.06883) gives 2e-4, and its public code builds a schedule that it never steps.  Weight decay excludes the gate, the
  modality embeddings and a learned temperature.
* A batch is a slice of a seeded permutation of the items, one permutation per epoch; the incomplete last batch of a
  permutation is dropped.  Items without an image cannot be aligned and are skipped.
* ``batch_size`` is the global batch: every process takes its slice of it, and the loss is that of all rows
  (``sda_core.losses.gather``).  With a ``micro_batch_size`` the slice goes through the model in chunks, with gradient
  caching (``sda_core.losses.grad_cache``).
* Images and texts go through the shared layers in two passes.  The loss is computed on detached vectors, and then each
  pass runs backward with its own gradient.  The sum equals that of one backward call, but the image graph is freed before
  the text pass runs backward, and the gradient of each modality can be measured.
* Every draw is seeded by the step and, with a ``micro_batch_size`` or several processes, by the modality and the number
  of the chunk in the global batch.  A run resumed on one process equals the uninterrupted run bit for bit.  With a
  ``micro_batch_size`` the chunks and their draws do not depend on the number of processes: runs on different numbers of
  processes, also after resuming, differ by the rounding of sums only.  Without one they also differ in dropout.
* A thread prepares inputs one chunk ahead, because decoding and tokenising would stall a GPU.
* An error in one process ends all of them with its message.
"""

from __future__ import annotations

from sda_core.alignment.inputs import Encoder, batch_rows
from sda_core.alignment.sharding import home
from sda_core.alignment.state import StepRecord
from sda_core.alignment.training import learning_rate, train_adapter

__all__ = ["Encoder", "StepRecord", "batch_rows", "home", "learning_rate", "train_adapter"]
