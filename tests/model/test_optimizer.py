"""Megatron's optimizer as we set it up, against torch's AdamW in float64, fed with the same made-up gradients.

One launch of this file as a worker, which keeps Megatron's adaptation to the CPU out of the test process.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nft_megatron.config.schema import OptimizerConfig

SETTINGS = {"learning_rate": 3e-3, "warmup_updates": 3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "clip_grad": 1.0}
NUM_UPDATES = 5


@pytest.fixture(scope="module")
def measured(model_folder: Path) -> dict:
    result = subprocess.run(
        [sys.executable, __file__, str(model_folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=150,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_warm_up_starts_above_zero_and_ends_at_the_full_rate():
    settings = OptimizerConfig(learning_rate=1e-6, warmup_updates=10)
    rates = [settings.learning_rate_at(update) for update in (1, 5, 10, 11, 1000)]
    assert rates == pytest.approx([1e-7, 5e-7, 1e-6, 1e-6, 1e-6], rel=1e-12)
    assert OptimizerConfig(learning_rate=1e-6, warmup_updates=0).learning_rate_at(1) == 1e-6


def test_updates_are_those_of_adamw_in_float64(measured: dict):
    assert measured["learning_rates"] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 3e-3])
    assert measured["grad_norms"] == pytest.approx(measured["expected_norms"], rel=1e-5)
    assert measured["grad_norms"][0] > 1 > measured["grad_norms"][1], "both sides of the clip are exercised"
    assert max(measured["errors"].values()) < 2e-6, measured["errors"]


def test_weights_without_decay_are_biases_and_norms(measured: dict):
    assert all(("bias" in name or "norm" in name) for name in measured["without_decay"])
    assert len(measured["without_decay"]) == 3 * 2 + 1  # QKV bias and two norms a layer, and the final norm


PROBLEMS = {
    "nan": "the gradient norm is nan",
    "inf": "the gradient norm is inf",
    "loss": "the loss is -inf",  # of finite gradients
}


@pytest.mark.parametrize("bad", PROBLEMS)
def test_a_gradient_that_is_not_finite_changes_nothing(measured: dict, bad: str):
    assert measured[bad] == {"problem": PROBLEMS[bad], "changed": [], "num_updates": NUM_UPDATES}


def test_small_updates_of_bfloat16_weights_add_up_in_the_master_copy(measured: dict):
    """Under a constant gradient each Adam update is the learning rate: 1e-4, a fortieth of bfloat16's step of 2^-8 below 1."""
    assert measured["bfloat16_first"] == 1.0
    assert measured["bfloat16_last"] == pytest.approx(1 - 100 * 1e-4, abs=2**-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_that_waits_on_the_host_changes_no_bit(measured: dict, dtype: str):
    """Half of the state, by size; float32 models have no master copy of their weights to move."""
    offloaded = measured[f"offloaded {dtype}"]
    assert offloaded["differs"] == []
    largest, total = offloaded["largest_parameter"], offloaded["num_parameters"]
    bytes_of = 12 if dtype == "bfloat16" else 8
    assert bytes_of * (total / 2 - largest) < offloaded["host_bytes"] <= bytes_of * total / 2
    assert offloaded["parked"] == offloaded["host_bytes"], "between updates the optimizer's tensors are the host's"


# ------------------------------------------------------------------------------------------------------------ the worker


def made_up_gradient(name: str, shape, update: int):
    """Update 0 is far above the clip, later ones are below it."""
    import torch

    generator = torch.Generator().manual_seed(sum(name.encode()) + update)
    return torch.randn(shape, generator=generator) * (0.5 if update == 0 else 0.002)


def worker(folder: Path) -> None:
    import gc

    from nft_megatron.model.topology import init_topology, shutdown

    topology = init_topology(threads=1)
    offloaded = {f"offloaded {dtype}": measure_offloaded(folder, topology, dtype) for dtype in ("float32", "bfloat16")}
    print(json.dumps(measure_float32(folder, topology) | measure_bfloat16(folder, topology) | offloaded))
    del topology
    gc.collect()
    shutdown()


def make(folder: Path, topology, dtype, settings: OptimizerConfig):
    from nft_megatron.model.build import build_model
    from nft_megatron.model.load import load_weights, table_parameters
    from nft_megatron.model.optimizer import PolicyOptimizer
    from nft_megatron.weights import read_shape

    shape = read_shape(folder)
    chunks = build_model(shape, topology, dtype=dtype)
    load_weights(chunks, topology, shape, folder)
    return dict(table_parameters(chunks)), PolicyOptimizer(chunks, settings)


def measure_float32(folder: Path, topology) -> dict:
    import torch

    parameters, optimizer = make(folder, topology, torch.float32, OptimizerConfig(**SETTINGS))
    twins = {name: torch.nn.Parameter(parameter.detach().double()) for name, parameter in parameters.items()}
    decay = [twin for twin in twins.values() if twin.dim() > 1]
    no_decay = [twin for twin in twins.values() if twin.dim() == 1]
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)

    result: dict = {"learning_rates": [], "grad_norms": [], "expected_norms": []}
    for number in range(NUM_UPDATES):
        for name, parameter in parameters.items():
            gradient = made_up_gradient(name, parameter.shape, number)
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


def measure_offloaded(folder: Path, topology, dtype: str) -> dict:
    import torch

    results = []
    for share in (0.0, 0.5):
        parameters, optimizer = make(folder, topology, getattr(torch, dtype), OptimizerConfig(**SETTINGS, cpu_offload=share))
        for number in range(3):
            for name, parameter in parameters.items():
                parameter.main_grad.copy_(made_up_gradient(name, parameter.shape, number))
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


def measure_bfloat16(folder: Path, topology) -> dict:
    import torch

    settings = OptimizerConfig(learning_rate=1e-4, warmup_updates=0, weight_decay=0.0)
    parameters, optimizer = make(folder, topology, torch.bfloat16, settings)
    norm = parameters["decoder.final_layernorm.weight"]
    result = {}
    for number in range(100):
        for parameter in parameters.values():
            parameter.main_grad.zero_()
        norm.main_grad.fill_(1.0)
        optimizer.step()
        result["bfloat16_last" if number else "bfloat16_first"] = float(norm[0])
    return result


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
