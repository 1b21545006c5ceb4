"""Which environment variables a trainer set for itself alone: servers that it starts should not have them."""

from __future__ import annotations

from collections.abc import Mapping

EXPORTED = "NFT_MEGATRON_EXPORTED"
"""The variable that names them, separated by spaces."""


def without_exported(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as the trainer found it.

    >>> without_exported({"PATH": "/bin", "NCCL_ALGO": "Ring", EXPORTED: "NCCL_ALGO"})
    {'PATH': '/bin'}
    """
    own = {EXPORTED, *environ.get(EXPORTED, "").split()}
    return {name: value for name, value in environ.items() if name not in own}
