"""What each rank does in tests/model/test_step.py: one prepared step, and the gradient of each of its mini-batches."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nft_megatron.assemble import build_trainer
from nft_megatron.config_load import load_config
from nft_megatron.model.optimizer import Update
from nft_megatron.model.step import Trainer
from nft_megatron.model.topology import init_topology, shutdown
from nft_megatron.weights import read_shape


class GradientRecorder:
    """In the optimizer's place: keeps every update's gradient under Hugging Face names and leaves the weights alone."""

    num_updates = 0

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.gradients: list[dict[str, torch.Tensor]] = []

    def step(self) -> Update:
        topology, (chunk,) = self._trainer.topology, self._trainer.chunks
        for buffer in chunk.buffers:  # the distributed optimizer leaves each data-parallel rank its shard of the sum
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(topology.data_size))
                dist.all_gather(shards, shards[topology.data_rank].clone(), group=topology.data_group)
        weights = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
        self.gradients.append({name: tensor.clone() for name, tensor in self._trainer.hf_tensors()})
        for name, parameter in chunk.named_parameters():
            parameter.data.copy_(weights[name])
        return Update(grad_norm=0.0, learning_rate=0.0, skipped=False)


def measure(config_path: Path, ledger: Path, out: Path) -> None:
    """Write ``out/gradient_<i>.safetensors`` of every mini-batch and ``out/stats.json``, on rank 0."""
    config = load_config(config_path)
    topology = init_topology(config.parallel.tensor, config.parallel.pipeline, timeout_seconds=60, threads=1)
    run(config, topology, ledger, out)
    del topology
    gc.collect()
    shutdown()


def run(config, topology, ledger: Path, out: Path) -> None:
    trainer = build_trainer(config, topology, read_shape(config.model.path))
    recorder = GradientRecorder(trainer)
    recording = replace(trainer, optimizer=recorder)
    batch = recording.prepare(ledger, step=1)
    updates = [recording.update(minibatch) for minibatch in batch.minibatches]
    if topology.is_main:
        out.mkdir()
        for i, gradients in enumerate(recorder.gradients):
            save_file(gradients, out / f"gradient_{i}.safetensors")
        stats = [{"positive": update.loss_positive, "negative": update.loss_negative} for update in updates]
        (out / "stats.json").write_text(json.dumps({"updates": stats, "metrics": batch.metrics}))
