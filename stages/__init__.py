"""The pipeline's stages: each loads its params, reads, calls ``sda_core``, writes.  ``sda --help`` lists them."""
