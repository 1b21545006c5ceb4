"""``nft-megatron serve``: a server on another machine for a run's fleet."""

from nft_megatron.rollout.fleet.serve import add_arguments

__all__ = ["add_arguments"]
