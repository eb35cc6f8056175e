"""Pre-training of nano, the small Qwen2.5-VL of this project: a pipeline of its own, see ``pretraining/README.md``."""
