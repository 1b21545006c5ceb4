"""What each rank runs in tests/model/test_parity.py, test_step.py and test_layouts.py, on a recorded step."""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from nft_megatron.base.errors import UserError
from nft_megatron.batching import context
from nft_megatron.batching.batch import MiniBatch, pack_minibatches, plan_step
from nft_megatron.config.load import load_config
from nft_megatron.data.ledger import OpenLedger, open_ledger
from nft_megatron.model import attention, objective, packed_sequences, shared_reading, step
from nft_megatron.model.gradient_export import hf_gradients
from nft_megatron.model.optimizer import Update
from nft_megatron.model.step import Trainer
from nft_megatron.model.topology import Topology, init_topology, shutdown
from nft_megatron.run.build import build_trainer
from nft_megatron.weights import read_shape


class GradientRecorder:
    """Replaces the optimizer: records every update's gradient under Hugging Face names and leaves the weights unchanged."""

    num_updates = 0

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.gradients: list[dict[str, torch.Tensor]] = []

    def step(self, loss: float) -> Update:
        trainer = self._trainer
        self.gradients.append({n: g.clone() for n, g in hf_gradients(trainer.chunks, trainer.topology, trainer.shape)})
        return Update(grad_norm=0.0, learning_rate=0.0)


@dataclass(frozen=True)
class Run:
    """One trainer's part of a launch: its configuration, its recorded step, and where the numbers go."""

    config: Path
    ledger: Path
    out: Path


def measure(runs: list[Run], mutation: str | None = None) -> None:
    """On rank 0, write ``out/gradient_<i>.safetensors`` for every mini-batch, ``out/weights.safetensors`` after an update on
    the first one, and ``out/stats.json``. All runs share one layout. ``mutation`` plants the fault of that name.
    """

    def all_runs(topology: Topology) -> None:
        with MUTATIONS[mutation](topology) if mutation else contextlib.nullcontext():
            for run in runs:
                _measure(run, topology)

    _in_topology(runs[0].config, all_runs)


def _in_topology(config: Path, action: Callable[[Topology], None]) -> None:
    parallel = load_config(config).parallel
    topology = init_topology(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        virtual_pipeline=parallel.virtual_pipeline,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
        timeout_seconds=240,
        threads=1,
    )
    action(topology)
    del topology
    gc.collect()
    shutdown()


def _trainer(run: Run, topology: Topology) -> Trainer:
    config = load_config(run.config)
    return build_trainer(config, topology, read_shape(config.model.path))


def _measure(run: Run, topology: Topology) -> None:
    trainer = _trainer(run, topology)
    recorder = GradientRecorder(trainer)
    recording = replace(trainer, optimizer=recorder)
    with _passes() as passed:
        batch = recording.prepare(run.ledger, step=1)
    updates = [recording.update(minibatch) for minibatch in batch.minibatches]
    metrics = recording.summary(batch, updates)
    applied = trainer.update(batch.minibatches[0]).applied
    weights = _export(trainer)
    packs = [
        {
            "rank": topology.data_rank,
            "name": f"{i}/{k}",
            "num_tokens": len(micro_batch.packed.targets_N),
            "num_current": int((~micro_batch.is_stale_N).sum()),
            "passed": any(micro_batch.packed is each.packed for each in passed),
        }
        for i, minibatch in enumerate(batch.minibatches)
        for k, micro_batch in enumerate(minibatch.micro_batches)
    ]
    of_all: list = [None] * topology.world_size
    dist.all_gather_object(of_all, packs, group=topology.control_group)
    if topology.is_main:
        run.out.mkdir(parents=True)
        for i, gradients in enumerate(recorder.gradients):
            save_file(gradients, run.out / f"gradient_{i}.safetensors")
        save_file(weights, run.out / "weights.safetensors")
        stats = {
            "updates": [{"positive": update.loss_positive, "negative": update.loss_negative} for update in updates],
            "grad_norm": applied.grad_norm,
            "metrics": metrics,
            "num_empty": sum(not pack["num_tokens"] for packs in of_all for pack in packs),
            "packs": [pack for packs in of_all for pack in packs],
        }
        (run.out / "stats.json").write_text(json.dumps(stats))


@contextlib.contextmanager
def _passes() -> Iterator[list]:
    """The micro-batches that a schedule without backward pass goes through."""
    passed: list = []

    def recording(chunks, forward_step, micro_batches, *, num_tokens, forward_only):
        passed.extend(micro_batches if forward_only else [])
        return run_schedule(chunks, forward_step, micro_batches, num_tokens=num_tokens, forward_only=forward_only)

    run_schedule = step.run_schedule
    with mock.patch.object(step, "run_schedule", recording):
        yield passed


def shared_reads(run: Run, failing: int | None = None) -> None:
    """Each rank writes ``out/rank<r>.json``: the rows of the ledger that it read, and whether its packs are those of a rank
    that reads all its answers itself. ``failing``: the rank that cannot read; each then writes the error that it got.
    """

    def all_ranks(topology: Topology) -> None:
        trainer, rows = _trainer(run, topology), []

        def tokens(opened: OpenLedger, wanted):
            rows.extend(wanted.tolist())
            if topology.rank == failing:
                raise OSError("stale file handle")
            return original(opened, wanted)

        original, report = OpenLedger.tokens, {}
        with mock.patch.object(OpenLedger, "tokens", tokens):
            try:
                shared = shared_reading.read_minibatches(topology, run.ledger, 1, trainer.algorithm, trainer.rules)
            except UserError as error:
                report = {"error": str(error)}
        if not report:
            with open_ledger(run.ledger) as opened:
                plan = plan_step(opened.index(), 1, trainer.algorithm, trainer.rules)
                own = plan.positions_of(topology.data_rank)
                tokens_of = dict(zip(own.tolist(), opened.tokens(plan.index.row[own]), strict=True))
            place = topology.data_rank, topology.context_rank, topology.device
            alone = pack_minibatches(plan, tokens_of, trainer.algorithm, trainer.rules, *place)
            report = {"rows": rows, "own": plan.index.row[own].tolist(), "differs": _differing(shared, alone)}
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / f"rank{topology.rank}.json").write_text(json.dumps(report))

    _in_topology(run.config, all_ranks)


def _differing(shared: list[MiniBatch], alone: list[MiniBatch]) -> list[str]:
    """The tensors of micro-batches that are not bit for bit as expected."""
    pairs = [
        (mine, expected)
        for one, other in zip(shared, alone, strict=True)
        for mine, expected in zip(one.micro_batches, other.micro_batches, strict=True)
    ]
    values = [(name, value, vars(other)[name]) for one, other in pairs for name, value in vars(one).items()]
    values += [(name, value, vars(other.packed)[name]) for one, other in pairs for name, value in vars(one.packed).items()]
    assert pairs
    return [name for name, a, b in values if isinstance(a, torch.Tensor) and not torch.equal(a, b)]


def mismatches(runs: list[Run]) -> None:
    """Write ``out/stats.json``: the mismatch of the ledger's answers, as in the log-prob probe. All runs share one layout."""

    def all_runs(topology: Topology) -> None:
        for run in runs:
            measured = _trainer(run, topology).mismatch(run.ledger, step=1)
            if topology.is_main:
                run.out.mkdir(parents=True)
                (run.out / "stats.json").write_text(json.dumps(measured))

    _in_topology(runs[0].config, all_runs)


def instruments(runs: list[Run]) -> None:
    """Write ``out/stats.json``: the summary of the first mini-batch's update with all metrics on. All runs share one layout."""

    def all_runs(topology: Topology) -> None:
        for run in runs:
            trainer = replace(_trainer(run, topology), gradient_cosine_every=1)
            batch = trainer.prepare(run.ledger, step=1)
            summary = trainer.summary(batch, [trainer.update(batch.minibatches[0])])
            if topology.is_main:
                run.out.mkdir(parents=True)
                (run.out / "stats.json").write_text(json.dumps(summary))

    _in_topology(runs[0].config, all_runs)


# ---------------------------------------------------------------------------------------------- exports and checkpoints


def reshard(runs: list[Run], references: list[Path]) -> None:
    """Export, train, save and restore each run; load what one process saved under ``references`` (itself, for one process)."""

    def all_runs(topology: Topology) -> None:
        for run, reference in zip(runs, references, strict=True):
            _reshard(run, reference, topology)

    _in_topology(runs[0].config, all_runs)


def _reshard(run: Run, reference: Path, topology: Topology) -> None:
    trainer = _trainer(run, topology)
    stats: dict = {"exported": _compare(_export(trainer), load_file(load_config(run.config).model.path / "model.safetensors"))}
    first, second = trainer.prepare(run.ledger, step=1).minibatches
    for minibatch in (first, second):
        trainer.update(minibatch)
    trainer.snapshot(step=7).write(_new_folder(run.out / "checkpoint", topology), topology)
    after_two = _export(trainer)
    trainer.update(first)
    after_three = _export(trainer)
    if run.out == reference and topology.is_main:
        save_file(after_two, run.out / "two.safetensors")
        save_file(after_three, run.out / "three.safetensors")
    dist.barrier(group=topology.control_group)
    of_one_process = load_file(reference / "three.safetensors")
    stats["update_error"] = _error(after_three, of_one_process)

    trainer = _trainer(run, topology)
    stats["restored_step"] = trainer.load(run.out / "checkpoint")
    stats["restored_updates"] = trainer.optimizer.num_updates
    trainer.update(first)
    stats["restored"] = _compare(_export(trainer), after_three)

    trainer = _trainer(run, topology)
    trainer.load(reference / "checkpoint")
    stats["resharded"] = _compare(_export(trainer), load_file(reference / "two.safetensors"))
    trainer.snapshot(step=7).write(_new_folder(run.out / "rewritten", topology), topology)
    trainer.update(first)
    stats["continued_error"] = _error(_export(trainer), of_one_process)
    if topology.is_main:
        (run.out / "stats.json").write_text(json.dumps(stats))


def restore(runs: list[Run], references: list[Path]) -> None:
    """One process resumes from every run's rewritten checkpoint; ``restored.json`` lists what differs from the references."""

    def all_runs(topology: Topology) -> None:
        for run, reference in zip(runs, references, strict=True):
            trainer = _trainer(run, topology)
            trainer.load(run.out / "rewritten")
            trainer.update(trainer.prepare(run.ledger, step=1).minibatches[0])
            differs = _compare(_export(trainer), load_file(reference / "three.safetensors"))
            (run.out / "restored.json").write_text(json.dumps(differs))

    _in_topology(runs[0].config, all_runs)


def _new_folder(path: Path, topology: Topology) -> Path:
    if topology.is_main:
        path.mkdir()
    dist.barrier(group=topology.control_group)
    return path


def _export(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The whole tensors on rank 0; empty elsewhere."""
    return {name: tensor.clone() for name, tensor in trainer.hf_tensors()}


def _compare(exported: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """On rank 0, the names of tensors that are not bit for bit as expected."""
    common = exported.keys() & expected.keys()
    return {
        "missing": sorted(expected.keys() - exported.keys()),
        "unexpected": sorted(exported.keys() - expected.keys()),
        "differs": sorted(name for name in common if not torch.equal(exported[name], expected[name])),
    }


def _error(exported: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """On rank 0, the largest difference of a tensor relative to its largest entry, or to 1 if that is smaller."""
    return max(
        (float((x - expected[name]).abs().max() / max(1.0, float(x.abs().max()))) for name, x in exported.items()), default=0.0
    )


# ------------------------------------------------------------------------------------------------- faults that peers had


@contextlib.contextmanager
def _without_reduction(topology: Topology) -> Iterator[None]:
    """Each rank keeps its own gradients of its keys and values and drops those of the others."""

    def own(everywhere: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return everywhere.chunk(group.size())[group.rank()]

    with mock.patch.object(attention, "_sum_own", own):
        yield


@contextlib.contextmanager
def _not_unzigzagged(topology: Topology) -> Iterator[None]:
    """Gathered keys are read as if ranks held consecutive tokens."""

    def consecutive(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        return torch.arange(int(cu_seqlens[-1])).chunk(size)[rank]

    with mock.patch.object(packed_sequences, "zigzag_index", consecutive):
        yield


@contextlib.contextmanager
def _contiguous_shards(topology: Topology) -> Iterator[None]:
    """Ranks get consecutive tokens while attention assumes the zigzag."""

    def consecutive(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        return torch.arange(int(cu_seqlens[-1])).chunk(size)[rank]

    with mock.patch.object(context, "zigzag_index", consecutive):
        yield


def _changed_batches(change):
    @contextlib.contextmanager
    def mutation(topology: Topology) -> Iterator[None]:
        def read(*arguments):
            minibatches = read_minibatches(*arguments)
            return [replace(b, micro_batches=tuple(change(m, topology) for m in b.micro_batches)) for b in minibatches]

        read_minibatches = step.read_minibatches
        with mock.patch.object(step, "read_minibatches", read):
            yield

    return mutation


def _rolled_labels(micro_batch, topology: Topology):
    """Targets are the rank's own inputs shifted by one, as if it held whole sequences."""
    packed = micro_batch.packed
    targets_N = packed.input_ids_T.roll(-1)[packed.loss_positions_N]
    return replace(micro_batch, packed=replace(packed, targets_N=targets_N))


@contextlib.contextmanager
def _partial_answers(topology: Topology) -> Iterator[None]:
    """The log-ratio of an answer covers only the tokens on this rank."""
    with mock.patch.object(objective._SumOverRanks, "apply", lambda part, group: part):
        yield


MUTATIONS = {
    "whole answers of one context rank alone": _partial_answers,
    "no reduction of dK and dV": _without_reduction,
    "gathered keys not put in order": _not_unzigzagged,
    "contiguous shards": _contiguous_shards,
    "labels rolled after slicing": _changed_batches(_rolled_labels),
    "loss averaged over context ranks": _changed_batches(
        lambda micro_batch, topology: replace(micro_batch, weight_N=micro_batch.weight_N / topology.context_size)
    ),
    "loss averaged over data ranks": _changed_batches(
        lambda micro_batch, topology: replace(micro_batch, weight_N=micro_batch.weight_N / topology.data_size)
    ),
}
