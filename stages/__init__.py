"""The stages of the pipeline: each loads its params, reads, calls ``sda_core``, and writes.  ``sda --help`` lists them."""
