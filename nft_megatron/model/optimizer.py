"""AdamW over Megatron-Core's distributed optimizer: float32 master weights and moments, sharded over data-parallel ranks.

    g      = Σ gradients, scaled by min(1, clip / (‖g‖ + 1e-6))           ‖g‖ over all ranks, each parameter once
    update t (from 1):  lr_t = lr · min(1, t / warm-up updates) · decay       OptimizerConfig.learning_rate_at
    θ      ← θ − lr_t · (m̂ / (√v̂ + ε) + decay · θ)                        no decay for biases and norms, unless decay_all

The first update already moves the weights: a warm-up that starts from zero wastes it (``warmup_stair`` does so, as published).
An update whose loss or gradient norm is not finite is skipped entirely: neither weights nor moments nor t change.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.transformer_config import TransformerConfig

from nft_megatron.base.errors import UserError
from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.model.offload import OffloadedState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one call of :meth:`PolicyOptimizer.step` did, the same on every rank.

    ``grad_norm`` is before clipping. ``problem``: what was not finite, so that the update was skipped; empty if it was applied.
    """

    grad_norm: float
    learning_rate: float
    problem: str = ""

    @property
    def skipped(self) -> bool:
        return bool(self.problem)


def _moments(settings: OptimizerConfig, config: TransformerConfig) -> dict[str, Any]:
    """Megatron's settings of its precision-aware optimizer; none if both moments are float32.

    Master weights stay float32 and whole: ``store_param_remainders`` would keep only the bits that the bfloat16 weights lack,
    and checkpoints could not be resumed without it.

    Raises:
        UserError: without Transformer Engine's Adam.
    """
    if not settings.has_small_moments:
        return {}
    if config.transformer_impl != "transformer_engine":
        field = "first_moment" if settings.first_moment == "bfloat16" else "second_moment"
        raise UserError(
            f"optimizer.{field}",
            "bfloat16",
            "needs a GPU and Transformer Engine, whose Adam alone keeps moments in it",
            "set it to float32, or install transformer-engine",
        )
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": getattr(torch, settings.first_moment),
        "exp_avg_sq_dtype": getattr(torch, settings.second_moment),
        "store_param_remainders": False,
    }


class PolicyOptimizer:
    """Updates the weights of ``chunks``. Create it after the weights are loaded: it takes the master copies.

    Attributes:
        megatron: Megatron's optimizer, for checkpoints.
        num_updates: updates that were applied, t − 1.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], settings: OptimizerConfig) -> None:
        self.settings = settings
        self.num_updates = 0
        dtype = chunks[0].config.params_dtype
        moments = _moments(settings, chunks[0].config)
        self.megatron = get_megatron_optimizer(
            MegatronConfig(
                optimizer="adam",
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.epsilon,
                clip_grad=settings.clip_grad,
                bf16=dtype is torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
                overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
                **moments,
            ),
            list(chunks),
            use_gloo_process_groups=False,
        )
        self._allocate_moments()
        self._apply_settings()
        device = next(chunks[0].parameters()).device
        self._offloaded = OffloadedState(self.megatron.chained_optimizers, settings.cpu_offload, device)

    def _allocate_moments(self) -> None:
        """Create the zero moments now rather than in the first update: a checkpoint may be saved or restored before it."""
        for megatron in self.megatron.chained_optimizers:
            if self.settings.has_small_moments:  # Megatron's call lacks an argument of Transformer Engine's from 2.1 on
                for group in megatron.optimizer.param_groups:
                    for parameter in group["params"]:
                        megatron.optimizer.initialize_state(parameter, store_param_remainders=False)
            else:
                megatron.init_state_fn(megatron.optimizer)
        self.count_updates()

    def count_updates(self) -> None:
        """Set Adam's step counters to ``num_updates``: torch's are per parameter, those of the fused optimizers per group."""
        for megatron in self.megatron.chained_optimizers:
            if isinstance(megatron.optimizer, torch.optim.AdamW):
                for parameter, state in megatron.optimizer.state.items():
                    state["step"] = torch.tensor(float(self.num_updates), device=parameter.device)
            else:
                for group in megatron.optimizer.param_groups:
                    group["step"] = self.num_updates

    def _apply_settings(self) -> None:
        """Set what Megatron keeps with its parameter groups.

        Megatron leaves it to its own scheduler to apply ``wd_mult``, 0 for biases and norms (optimizer_param_scheduler.py:294).
        Without Transformer Engine and apex it creates torch's AdamW, which by default passes over memory once per operation.
        """
        for megatron in self.megatron.chained_optimizers:
            if isinstance(megatron.optimizer, torch.optim.AdamW):
                for group in megatron.optimizer.param_groups:
                    group |= {"fused": True, "foreach": False}
        for group in self.megatron.param_groups:
            group["weight_decay"] = self.settings.weight_decay * (1.0 if self.settings.decay_all else group["wd_mult"])
            group["betas"] = (self.settings.beta1, self.settings.beta2)
            group["eps"] = self.settings.epsilon

    def state_on_device(self) -> AbstractContextManager[None]:
        """A context in which all master weights and moments are on the device, for code that reads or replaces them."""
        return self._offloaded.on_device()

    def step(self, loss: float = 0.0) -> Update:
        """Apply the gradients that the schedule left in the chunks. A collective over all ranks.

        ``loss`` is that of the mini-batch, over all ranks. It may be infinite although its gradient is not: a term that a
        clamp or a mask cuts off.
        """
        with self.state_on_device():
            return self._step(loss)

    def _step(self, loss: float) -> Update:
        learning_rate = self.settings.learning_rate_at(self.num_updates + 1)
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        not_finite = {"loss": loss, "gradient norm": grad_norm}
        if problem := ", ".join(f"the {name} is {value}" for name, value in not_finite.items() if not math.isfinite(value)):
            log.warning("%s: skipping update %d", problem, self.num_updates + 1)
            return Update(grad_norm, learning_rate, problem)
        if self.settings.clip_grad:
            for megatron in self.megatron.chained_optimizers:  # two if experts are spread over ranks
                clip_grad_by_total_norm_fp32(
                    megatron.get_parameters(),
                    self.settings.clip_grad,
                    grad_norm,
                    use_decoupled_grad=self.settings.has_small_moments,
                )
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate
        self.megatron.step_with_ready_grads()
        self.num_updates += 1
        return Update(grad_norm, learning_rate)
