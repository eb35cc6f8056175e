"""Pre-training of nano, the small Qwen2.5-VL of this project, as a separate pipeline; see ``pretraining/README.md``."""
