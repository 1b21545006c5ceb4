"""Converters between Hugging Face folders and Megatron-Core checkpoints, without building a model.

When dtypes are kept, a conversion only moves byte ranges. So a checkpoint of any format is just a table here: for every
Hugging Face tensor its dtype, its shape and the rectangles of bytes that it consists of (``blocks.py``). Readers build that
table from what is on disk (``huggingface.py``, ``torch_dist.py``, ``mp_rank.py``), writers plan it for files that do not exist
yet, and one loop (``engine.py``) moves, hashes, scans and compares bands of at most 8 MB.
"""
