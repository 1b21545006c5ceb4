"""Converters between Hugging Face folders and Megatron-Core checkpoints, without building a model.

With the dtype kept, a conversion only moves byte ranges. So a checkpoint, in whatever format, is here nothing but a table: for
every Hugging Face tensor its dtype, its shape and the rectangles of bytes that it consists of (``blocks.py``). Readers make
that table from what is on the disk (``huggingface.py``, ``torch_dist.py``, ``mp_rank.py``), writers plan it for files that do
not exist yet, and one loop (``engine.py``) moves, hashes, scans and compares bands of at most 8 MB.
"""
