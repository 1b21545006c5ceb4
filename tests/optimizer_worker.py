"""What tests/model/test_optimizer.py measures in a separate process, to keep Megatron's CPU adaptation out of its own."""

import gc
import math
from pathlib import Path

import torch

from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.model.build import build_model
from nft_megatron.model.load import load_weights, table_parameters
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.topology import init_topology, shutdown
from nft_megatron.weights import read_shape

SETTINGS = {"learning_rate": 3e-3, "warmup_updates": 3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "clip_grad": 1.0}
NUM_UPDATES = 5

PROBLEMS = {
    "nan": "the gradient norm is nan",
    "inf": "the gradient norm is inf",
    "loss": "the loss is -inf",  # of finite gradients
}


def _made_up_gradient(name: str, shape, update: int):
    """Gradients of update 0 are far above the clip, later ones below it."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + update)
    return torch.randn(shape, generator=generator) * (0.5 if update == 0 else 0.002)


def measure(folder: Path) -> dict:
    topology = init_topology(threads=1)
    offloaded = {f"offloaded {dtype}": _offloaded(folder, topology, dtype) for dtype in ("float32", "bfloat16")}
    result = _float32(folder, topology) | _bfloat16(folder, topology) | offloaded
    result["decay_all"] = _decay_all(folder, topology)
    del topology
    gc.collect()
    shutdown()
    return result


def _make(folder: Path, topology, dtype, settings: OptimizerConfig):
    shape = read_shape(folder)
    chunks = build_model(shape, topology, dtype=dtype)
    load_weights(chunks, topology, shape, folder)
    return dict(table_parameters(chunks)), PolicyOptimizer(chunks, settings)


def _float32(folder: Path, topology) -> dict:
    parameters, optimizer = _make(folder, topology, torch.float32, OptimizerConfig(**SETTINGS))
    twins = {name: torch.nn.Parameter(parameter.detach().double()) for name, parameter in parameters.items()}
    decay = [twin for twin in twins.values() if twin.dim() > 1]
    no_decay = [twin for twin in twins.values() if twin.dim() == 1]
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)

    result: dict = {"learning_rates": [], "grad_norms": [], "expected_norms": []}
    for number in range(NUM_UPDATES):
        for name, parameter in parameters.items():
            gradient = _made_up_gradient(name, parameter.shape, number)
            parameter.main_grad.copy_(gradient)
            twins[name].grad = gradient.double()
        update = optimizer.step()
        result["expected_norms"].append(float(torch.nn.utils.clip_grad_norm_(list(twins.values()), 1.0)))
        for group in reference.param_groups:
            group["lr"] = 3e-3 * min(1, (number + 1) / 3)
        reference.step()
        result["learning_rates"].append(update.learning_rate)
        result["grad_norms"].append(update.grad_norm)
    result["errors"] = {name: float((parameters[name].detach() - twin.detach()).abs().max()) for name, twin in twins.items()}
    (megatron,) = optimizer.megatron.chained_optimizers
    decay_of = [group["weight_decay"] for group in megatron.param_groups]
    group_of = {name: megatron.model_param_group_index_map[parameter][0] for name, parameter in parameters.items()}
    result["without_decay"] = [name for name, group in group_of.items() if decay_of[group] == 0]

    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for bad in PROBLEMS:
        for parameter in parameters.values():
            parameter.main_grad.zero_()
        parameters["decoder.final_layernorm.weight"].main_grad[0] = 1.0 if bad == "loss" else float(bad)
        update = optimizer.step(-math.inf if bad == "loss" else 0.0)
        changed = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
        result[bad] = {"problem": update.problem, "changed": changed, "num_updates": optimizer.num_updates}
    return result


def _decay_all(folder: Path, topology) -> dict[str, float]:
    """After an update with zero gradients, each parameter's largest distance from its decayed value."""
    parameters, optimizer = _make(folder, topology, torch.float32, OptimizerConfig(**SETTINGS, decay_all=True))
    expected = {name: parameter.detach().double() * (1 - 1e-3 * 0.1) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.main_grad.zero_()
    optimizer.step()
    return {name: float((parameter.detach() - expected[name]).abs().max()) for name, parameter in parameters.items()}


def _offloaded(folder: Path, topology, dtype: str) -> dict:
    results = []
    for share in (0.0, 0.5):
        parameters, optimizer = _make(folder, topology, getattr(torch, dtype), OptimizerConfig(**SETTINGS, cpu_offload=share))
        for number in range(3):
            for name, parameter in parameters.items():
                parameter.main_grad.copy_(_made_up_gradient(name, parameter.shape, number))
            optimizer.step()
        (megatron,) = optimizer.megatron.chained_optimizers
        state = {
            f"{i} {name}": tensor
            for i, (master, moments) in enumerate(megatron.optimizer.state.items())
            for name, tensor in [("weight", master.data), *moments.items()]
            if name != "step"
        }
        results.append(state | {name: parameter.detach() for name, parameter in parameters.items()})
    hosts = {tensor.data_ptr() for parked in optimizer._offloaded._parameters for tensor in parked.host.values()}
    sizes = [parameter.numel() for parameter in megatron.optimizer.state]
    return {
        "differs": [name for name, tensor in results[0].items() if not torch.equal(tensor, results[1][name])],
        "host_bytes": optimizer._offloaded.num_bytes,
        "parked": sum(tensor.nbytes for tensor in state.values() if tensor.data_ptr() in hosts),
        "largest_parameter": max(sizes),
        "num_parameters": sum(sizes),
    }


def _bfloat16(folder: Path, topology) -> dict:
    parameters, optimizer = _make(
        folder, topology, torch.bfloat16, OptimizerConfig(learning_rate=1e-4, warmup_updates=0, weight_decay=0.0)
    )
    norm = parameters["decoder.final_layernorm.weight"]
    result = {}
    for number in range(100):
        for parameter in parameters.values():
            parameter.main_grad.zero_()
        norm.main_grad.fill_(1.0)
        optimizer.step()
        result["bfloat16_last" if number else "bfloat16_first"] = float(norm[0])
    return result
