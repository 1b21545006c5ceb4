"""The speed switches of a configuration, as far as they change memory or time."""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.config.schema import Config

MOMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Switches:
    """Of section ``kernels``, and the bytes of both moments of a parameter.

    >>> Switches().moment_bytes
    8
    """

    fused_gradients: bool = True
    fused_head: bool = True
    overlapped_gathering: bool = False
    overlapped_tensor: bool = False
    moment_bytes: int = 8

    @classmethod
    def of(cls, config: Config, *, on_gpu: bool) -> Switches:
        """Those of ``config``. On the CPU what kernels save costs nothing: temporaries stay in its cache."""
        kernels, optimizer = config.kernels, config.optimizer
        return cls(
            fused_gradients=kernels.gradient_accumulation_fusion or not on_gpu,
            fused_head=kernels.fused_lm_head or not on_gpu,
            overlapped_gathering=kernels.overlap_parameter_gather,
            overlapped_tensor=kernels.overlap_tensor_communication,
            moment_bytes=MOMENT_BYTES[optimizer.first_moment] + MOMENT_BYTES[optimizer.second_moment],
        )


DEFAULTS = Switches()
