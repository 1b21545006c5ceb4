"""The weights fingerprint: one hash that proves that trainer, file and engine hold the same weights.

It covers every tensor's Hugging Face name, dtype, shape and bytes, and does not depend on the order of the stream. The bytes
are hashed as given: the same numbers in another dtype have a different fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of ``tensor`` in row-major memory order; no copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def begin_digest(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> hashlib._Hash:
    """The digest of a tensor whose bytes are still to come, in row-major order."""
    return hashlib.sha256(f"{name}\0{str(dtype).removeprefix('torch.')}\0{tuple(shape)}\0".encode())


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """SHA-256 over one tensor's name, dtype, shape and bytes, as 64 hexadecimal digits."""
    digest = begin_digest(name, tensor.dtype, tuple(tensor.shape))
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def combine_digests(digests: Iterable[str]) -> str:
    """The fingerprint of a set of tensors from the digest of each, in any order: 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:32]


def weights_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The fingerprint of a stream of named tensors.

    >>> a, b = ("a", torch.zeros(2)), ("b", torch.ones(2, 3))
    >>> weights_fingerprint([a, b]) == weights_fingerprint([b, a])
    True
    >>> weights_fingerprint([a, b]) == weights_fingerprint([a, ("b", torch.ones(3, 2))])
    False
    """
    return combine_digests(tensor_digest(name, tensor) for name, tensor in tensors)
