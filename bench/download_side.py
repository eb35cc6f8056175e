"""This project's side of the download comparison: ``python -m bench.download_side REVIEWS METADATA RAW``."""

import sys
from pathlib import Path

from sda_core.fetch.download import download
from sda_core.params import AmazonDataset, DownloadParams

reviews, metadata, raw = sys.argv[1:]
dataset = AmazonDataset(
    source="amazon", edition=2018, category="Bench", reviews=(reviews,), metadata=(metadata,), image_archive=None,
    reviews_sha256=None, metadata_sha256=None, image_archive_sha256=None, image_folder=None, local_folder=None,
)  # fmt: skip
params = DownloadParams(timeout_seconds=60.0, num_retries=0, backoff_seconds=1.0, max_file_bytes=1 << 40)
download(dataset, params, Path(raw), Path())
