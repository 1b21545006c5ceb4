"""Updates with Adam's moments in bfloat16 and float32, for tests/model/test_moments.py.

Transformer Engine's Adam, which alone keeps bfloat16 moments, has kernels for GPUs only. A stand-in has its interface and its
formula.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from parity_worker import Run, _in_topology, _new_folder, _trainer

from nft_megatron.model import optimizer
from nft_megatron.model.topology import Topology


class FusedAdam(torch.optim.Optimizer):
    """As much of ``transformer_engine.pytorch.optimizers.FusedAdam`` (2.20) as Megatron-Core and this package use.

    It holds the master weights, reads ``decoupled_grad``, and rounds the moments when it has used them.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
    ):
        assert adam_w_mode and not capturable and master_weights and use_decoupled_grad and not store_param_remainders
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}

    def initialize_state(self, param, store_param_remainders):
        assert not store_param_remainders
        self.state[param] = {name: torch.zeros(param.shape, dtype=dtype) for name, dtype in self.dtypes.items()}
        self.state[param]["master_param"].copy_(param.detach())

    def get_unscaled_state(self, param, state_name):
        return self.state[param][state_name].float()

    def set_scaled_state(self, param, state_name, unscaled_state):
        assert unscaled_state.dtype == torch.float32
        state = self.state[param].setdefault(state_name, torch.empty(param.shape, dtype=self.dtypes[state_name]))
        state.copy_(unscaled_state)

    def load_state_dict(self, state_dict):
        """torch's own gives every state the dtype of its parameter."""
        super().load_state_dict(state_dict)
        parameters = [param for group in self.param_groups for param in group["params"]]
        for number, states in state_dict["state"].items():
            self.state[parameters[number]] = {}
            for name, state in states.items():
                self.set_scaled_state(parameters[number], name, state.float())

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                grad, state = param.decoupled_grad, self.state[param]
                first, second = (state[name].float() for name in ("exp_avg", "exp_avg_sq"))
                first.mul_(beta1).add_(grad, alpha=1 - beta1)
                second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)
                size = (second / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                change = first / (1 - beta1 ** group["step"]) / size + group["weight_decay"] * state["master_param"]
                state["master_param"].sub_(group["lr"] * change)
                param.copy_(state["master_param"])


@contextmanager
def transformer_engine() -> Iterator[None]:
    """Let Megatron-Core find the stand-in."""
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(megatron_optimizer, "Adam", FusedAdam),
        mock.patch.object(distrib_optimizer, "Adam", FusedAdam),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True),
        mock.patch.object(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
        mock.patch.object(megatron_optimizer, "is_te_min_version", return_value=True),
        mock.patch.object(optimizer_config, "is_te_min_version", return_value=True),
        mock.patch.object(optimizer, "_moments", _moments_with_engine),
    ):
        yield


_moments = optimizer._moments


def _moments_with_engine(settings, config):
    return _moments(settings, SimpleNamespace(transformer_impl="transformer_engine"))


def compare(exact: Run, small: Run, out: Path) -> dict:
    """Two updates each with float32 and with bfloat16 moments; then each resumes what the other saved. Rank 0's findings."""
    found: dict = {}

    def both(topology: Topology) -> None:
        found.update(_compare(exact, small, out, topology))

    _in_topology(exact.config, both)
    return found


def _compare(exact: Run, small: Run, out: Path, topology: Topology) -> dict:
    before = _trainer(exact, topology)
    minibatches = before.prepare(exact.ledger, step=1).minibatches
    initial = _master(before)
    norms = [before.update(minibatch).applied.grad_norm for minibatch in minibatches]
    before.snapshot(step=1).write(_new_folder(out / "exact", topology), topology)
    with transformer_engine():
        trainer = _trainer(small, topology)
        dtypes = {name: str(state.dtype) for name, state in next(iter(_states(trainer))).items()}
        small_norms = [trainer.update(minibatch).applied.grad_norm for minibatch in minibatches]
        trainer.snapshot(step=1).write(_new_folder(out / "small", topology), topology)
        saved, moments = _master(trainer), _moments_of(trainer)
        trainer.update(minibatches[0])
        uninterrupted = _master(trainer)
        resumed = _trainer(small, topology)
        resumed.load(out / "small")
        restored = torch.equal(_moments_of(resumed), moments) and torch.equal(_master(resumed), saved)
        resumed.update(minibatches[0])
        crossed = _trainer(small, topology)
        crossed.load(out / "exact")
        rounded = torch.equal(_moments_of(crossed), _moments_of(before).bfloat16().float())
    back = _trainer(exact, topology)
    back.load(out / "small")
    return {
        "dtypes": dtypes,
        "norms": (norms, small_norms),
        "moved": float((_master(before) - initial).abs().max()),
        "difference": float((_master(before) - saved).abs().max()),
        "restored": restored,
        "resumed to the bit": torch.equal(_master(resumed), uninterrupted),
        "small loads exact": rounded and torch.equal(_master(crossed), _master(before)),
        "exact loads small": torch.equal(_moments_of(back), moments) and torch.equal(_master(back), saved),
    }


def _states(trainer) -> list[dict]:
    return [state for megatron in trainer.optimizer.megatron.chained_optimizers for state in megatron.optimizer.state.values()]


def _master(trainer) -> torch.Tensor:
    """This rank's master weights."""
    shards = []
    for megatron in trainer.optimizer.megatron.chained_optimizers:
        for parameter, state in megatron.optimizer.state.items():
            shards.append(state.get("master_param", parameter).detach().flatten().clone())
    return torch.cat(shards)


def _moments_of(trainer) -> torch.Tensor:
    """This rank's moments, in float32."""
    states = _states(trainer)
    return torch.cat([state[name].float().flatten() for state in states for name in ("exp_avg", "exp_avg_sq")])
