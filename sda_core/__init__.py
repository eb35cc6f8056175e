"""SDA: structural and disentangled adaptation of vision-language models for recommendation.

Dimension key, used as suffixes of tensor names throughout (``a_RD`` is a tensor of shape ``(R, D)``):

====  ==========================================  ====  =====================================
B     batch                                       U     users
L     sequence length                             I     items
D     width of an input or an embedding           N     negatives per target; layers of a model
O     output width of a linear layer              H     attention heads
E     experts                                     M     modalities
R     LoRA rank (total over experts)              K     cut-off of a metric
W     width of a modality embedding
====  ==========================================  ====  =====================================

Ids are contiguous ``int32`` from 1; 0 is padding.  Tables are joined by ``item_id``, never by position.

Importing this package registers MoDA with PEFT, so that ``PeftModel.from_pretrained`` loads its adapters.  The import does
not load torch: MoDA is imported only if PEFT is imported too, before or after this package.
"""

from importlib.metadata import PackageNotFoundError, version

from sda_core import _peft_hook

try:
    __version__ = version("sda-rec")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+uninstalled"

_peft_hook.install()

__all__ = ["__version__"]
