"""One tiny model under every layout: what it computes, learns, exports and saves against Hugging Face and against one process.

Each layout is one launch of this file as a worker, which does everything for a tied and an untied model and leaves its numbers
in a JSON file. Gradients are those of a weighted sum of log-probs, mapped through the weight table.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

LAUNCHES = {  # tensor, pipeline, processes: layouts that one launch goes through, and what they switch on
    (1, 1, 1): {"one process": {}},
    (2, 1, 2): {"tensor 2": {}, "tensor 2 with sequence parallel": {"sequence_parallel": True}},
    (1, 2, 2): {"pipeline 2 with recomputation": {"recompute": "full"}},
    (1, 1, 2): {"data 2": {}},
}
LAYOUTS = [name for layouts in LAUNCHES.values() for name in layouts]
TIED = {"untied": False, "tied": True}
VOCAB, LAYERS = 131, 4  # 131 rows do not divide by 2: padding at tensor 2
DEADLINE_SECONDS = 150


def results(folder: Path, layout: str) -> dict:
    """What was measured of a layout, by kind of model. Launches what is not there yet, one process first: others compare."""
    if not (folder / f"{layout}.json").exists():
        if layout != LAYOUTS[0]:
            results(folder, LAYOUTS[0])
        (tensor, pipeline, processes), layouts = next(item for item in LAUNCHES.items() if layout in item[1])
        run_worker({"folder": str(folder), "tensor": tensor, "pipeline": pipeline, "layouts": layouts}, processes)
    return json.loads((folder / f"{layout}.json").read_text())


def run_worker(settings: dict, processes: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    worker = subprocess.Popen(
        [sys.executable, *launcher, __file__, json.dumps(settings)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = worker.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        output, _ = worker.communicate()
        pytest.fail(f"no end after {DEADLINE_SECONDS} s\n{output[-4000:]}")
    assert worker.returncode == 0, output[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random Hugging Face models with biases and norms that matter."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("layouts")
    for kind, tied in TIED.items():
        torch.manual_seed(7)
        config = Qwen2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, rope_theta=100.0, tie_word_embeddings=tied,
            attn_implementation="eager",
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
            else:
                parameter.data *= 4
        model.save_pretrained(folder / kind)
        save_file(transformers_reference(model), folder / f"{kind}-reference.safetensors")
    return folder


def transformers_reference(model) -> dict:
    """Log-probs of each pack and the gradients of all packs together, one sequence at a time."""
    import torch

    reference = {}
    for pack in PACKS:
        ids, _, loss_positions, weights = pack.tensors()
        logits = torch.cat([model(sequence[None]).logits[0] for sequence in ids.split(pack.lengths)])
        logprob = logits[loss_positions].log_softmax(-1).gather(1, ids[loss_positions + 1, None])[:, 0]
        (weights * logprob).sum().backward()
        reference[f"logprob {pack.seed}"] = logprob.detach()
    return reference | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module", params=LAYOUTS)
def measured(request: pytest.FixtureRequest, folder: Path) -> dict:
    return results(folder, request.param)


@pytest.mark.parametrize("kind", TIED)
def test_logprobs_are_those_of_transformers(measured: dict, kind: str):
    assert measured[kind]["num_logprobs"] > 50
    assert measured[kind]["logprob_difference"] < 1e-4


@pytest.mark.parametrize("kind", TIED)
def test_gradients_are_the_plain_sums_of_transformers(measured: dict, kind: str):
    assert measured[kind]["gradient_error"], "no parameter was compared"
    assert max(measured[kind]["gradient_error"].values()) < 1e-5, measured[kind]["gradient_error"]


@pytest.mark.parametrize("kind", TIED)
def test_gradient_norm_counts_every_parameter_once(measured: dict, kind: str):
    ours, theirs = measured[kind]["gradient_norm"]
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("kind", TIED)
def test_export_gives_back_the_folder_bit_for_bit(measured: dict, kind: str):
    assert measured[kind]["export_differs"] == []
    assert measured[kind]["export_names_equal"]


@pytest.mark.parametrize("kind", TIED)
def test_updates_agree_with_one_process(measured: dict, kind: str):
    assert measured[kind]["update_error"] < 2e-5


@pytest.mark.parametrize("kind", TIED)
def test_a_restored_run_goes_on_to_the_bit(measured: dict, kind: str):
    assert measured[kind]["restored_differs"] == []
    assert measured[kind]["restored_extra"] == {"step": 2, "note": "π"}
    assert measured[kind]["restored_updates"] == 2


@pytest.mark.parametrize("kind", TIED)
def test_a_checkpoint_of_one_process_loads_under_every_layout(measured: dict, kind: str):
    assert measured[kind]["resharded_differs"] == []
    assert measured[kind]["continued_error"] < 2e-5


def test_what_any_layout_saved_is_the_same(folder: Path):
    """One process restores what each layout wrote right after loading one process's checkpoint, and goes on to the bit."""
    for layout in LAYOUTS:
        results(folder, layout)
    written = [f"{kind}-rewritten-{layout}" for kind in TIED for layout in LAYOUTS]
    run_worker({"folder": str(folder), "tensor": 1, "pipeline": 1, "restore": written}, 1)
    assert json.loads((folder / "restored.json").read_text()) == {name: [] for name in written}


# ------------------------------------------------------------------------------------------------------------ the worker


@dataclass(frozen=True)
class Pack:
    """A micro-batch: tokens of several sequences, and a weight for each next token but those of a prompt of two."""

    lengths: list[int]
    seed: int

    def tensors(self):
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, VOCAB, (sum(self.lengths),), generator=generator)
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        starts = torch.tensor([0, *self.lengths]).cumsum(0)[:-1]
        loss_positions = torch.cat(
            [start + torch.arange(1, length - 1) for start, length in zip(starts, self.lengths, strict=True)]
        )
        weights = torch.randn(len(loss_positions), generator=generator)
        return ids, positions, loss_positions, weights


PACKS = [Pack([7, 12, 5, 30, 10], 1), Pack([20, 3, 3, 16], 2)]  # totals divide by 2, as sequence parallelism asks


def worker(settings: dict) -> None:
    import gc

    from nft_megatron.model.topology import init_topology, shutdown

    topology = init_topology(settings["tensor"], settings["pipeline"], timeout_seconds=60, threads=1)
    run = restore_all if "restore" in settings else measure_all
    run(Path(settings["folder"]), settings, topology)
    del topology
    gc.collect()
    shutdown()


def restore_all(folder: Path, settings: dict, topology) -> None:
    from safetensors.torch import load_file

    from nft_megatron.model.checkpoint import load_checkpoint

    differs = {}
    for name in settings["restore"]:
        kind, _ = name.split("-", 1)
        lab = Lab(folder / kind, topology, {})
        load_checkpoint(folder / name, lab.chunks, lab.optimizer, topology)
        lab.update()
        differs[name] = lab.differences(load_file(folder / f"{kind}-one process.safetensors"))
    (folder / "restored.json").write_text(json.dumps(differs))


def measure_all(folder: Path, settings: dict, topology) -> None:
    import torch.distributed as dist

    for layout, switches in settings["layouts"].items():
        measured = {kind: measure(folder, kind, layout, switches, topology) for kind in TIED}
        of_ranks: list = [None] * topology.world_size
        dist.all_gather_object(of_ranks, measured, group=topology.control_group)
        if topology.is_main:
            for kind, result in measured.items():
                others = [other[kind] for other in of_ranks]
                result["num_logprobs"] = max(other["num_logprobs"] for other in others)
                result["logprob_difference"] = max(other["logprob_difference"] for other in others)
                result["gradient_error"] = {
                    f"{k} on rank {i}": v for i, x in enumerate(others) for k, v in x["gradient_error"].items()
                }
            (folder / f"{layout}.json").write_text(json.dumps(measured))


class Lab:
    """The model under test with its optimizer, freshly loaded."""

    def __init__(self, model_folder: Path, topology, switches: dict) -> None:
        from nft_megatron.model.build import build_model
        from nft_megatron.model.load import load_weights
        from nft_megatron.model.optimizer import AdamW, PolicyOptimizer
        from nft_megatron.weights import read_shape

        self.topology = topology
        self.shape = read_shape(model_folder)
        self.chunks = build_model(self.shape, topology, **{"sequence_parallel": False, **switches})
        load_weights(self.chunks, topology, self.shape, model_folder)
        self.optimizer = PolicyOptimizer(self.chunks, AdamW(1e-3, warmup_updates=2))

    def gradients(self) -> list:
        """Forward and backward over this data rank's packs; what the loss functions kept of each."""
        from nft_megatron.model.attention import pack_sequences
        from nft_megatron.model.build import NO_TOKEN_COUNT, forward_backward, lm_head_weight, zero_gradients
        from nft_megatron.model.logprob import token_logprobs

        def forward_step(data, chunk):
            pack = next(data)
            ids, positions, loss_positions, weights = pack.tensors()
            packed = pack_sequences(pack.lengths, self.topology.device)
            hidden = chunk(ids[None], positions[None], packed, loss_positions)

            def loss_function(hidden):
                logprob = token_logprobs(
                    hidden, lm_head_weight(chunk), ids[loss_positions + 1], temperature=1.0, vocab_size=VOCAB,
                    group=self.topology.tensor_group, chunk_size=16,
                ).logprob_N  # fmt: skip
                return (weights * logprob).sum(), NO_TOKEN_COUNT, (pack, logprob.detach())

            return hidden, loss_function

        packs = PACKS[self.topology.data_rank :: self.topology.data_size]
        zero_gradients(self.chunks)
        return forward_backward(self.chunks)(
            forward_step_func=forward_step, data_iterator=[iter(packs)], model=self.chunks, num_microbatches=len(packs),
            seq_length=1, micro_batch_size=1, forward_only=False,
        )  # fmt: skip

    def complete_gradients(self) -> None:
        """Give every data rank the sums that the distributed optimizer leaves scattered."""
        import torch.distributed as dist

        for buffer in self.chunks[0].buffers:
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(self.topology.data_size))
                dist.all_gather(shards, shards[self.topology.data_rank].clone(), group=self.topology.data_group)

    def update(self):
        self.gradients()
        return self.optimizer.step()

    def export(self) -> dict:
        from nft_megatron.model.export import hf_tensors

        return {name: tensor.clone() for name, tensor in hf_tensors(self.chunks, self.topology, self.shape)}

    def differences(self, expected: dict) -> list[str]:
        """Names of the exported tensors that are not bit for bit those expected; on rank 0."""
        import torch

        export = self.export()
        return [name for name, tensor in export.items() if not torch.equal(tensor, expected[name])]

    def error(self, expected: dict) -> float:
        """Largest difference of an exported tensor relative to its largest entry; 0 on other ranks than 0."""
        export = self.export()
        errors = [float((x - expected[name]).abs().max() / expected[name].abs().max()) for name, x in export.items()]
        return max(errors, default=0.0)


def measure(folder: Path, kind: str, layout: str, switches: dict, topology) -> dict:
    import torch.distributed as dist
    from safetensors.torch import load_file, save_file

    from nft_megatron.model.build import padded_vocab
    from nft_megatron.model.checkpoint import load_checkpoint, save_checkpoint
    from nft_megatron.model.load import table_parameters
    from nft_megatron.weights import weight_table
    from nft_megatron.weights.table import merge

    def fresh() -> Lab:
        return Lab(folder / kind, topology, switches)

    def checkpoint(name: str) -> Path:
        path = folder / f"{kind}-{name}"
        if topology.is_main:
            path.mkdir()
        dist.barrier(group=topology.control_group)
        return path

    lab = fresh()
    stored = load_file(folder / kind / "model.safetensors")
    export = lab.export()
    result: dict = {
        "export_differs": lab.differences(stored),
        "export_names_equal": export.keys() == stored.keys(),
    }

    # Log-probs and gradients against transformers.
    reference = load_file(folder / f"{kind}-reference.safetensors")
    kept = lab.gradients()
    result["num_logprobs"] = sum(len(logprob) for _, logprob in kept)
    result["logprob_difference"] = max(
        (float((logprob - reference[f"logprob {pack.seed}"]).abs().max()) for pack, logprob in kept), default=-1.0
    )
    lab.complete_gradients()
    entries, rows = weight_table(lab.shape).by_name, padded_vocab(lab.shape, topology)
    result["gradient_error"] = {}
    for name, parameter in table_parameters(lab.chunks):
        sources = [reference[source] for source in entries[name].sources]
        expected = merge(entries[name], sources, topology.tensor_size, topology.tensor_rank, rows)
        largest = max(float(source.abs().max()) for source in sources)
        result["gradient_error"][name] = float((parameter.main_grad - expected).abs().max()) / largest

    # Two updates, a checkpoint, a third update; the same third update after restoring.
    gradient_norm = sum(float(reference[name].double().square().sum()) for name in stored) ** 0.5
    update = lab.update()
    result["gradient_norm"] = [update.grad_norm, gradient_norm]
    lab.update()
    own = checkpoint(layout)
    save_checkpoint(own, lab.chunks, lab.optimizer, topology, {"step": 2, "note": "π"})
    second = lab.export()
    lab.update()
    third = lab.export()
    if layout == "one process":
        save_file(second, folder / f"{kind}-one process second.safetensors")
        save_file(third, folder / f"{kind}-one process.safetensors")
    third_of_one_process = load_file(folder / f"{kind}-one process.safetensors")
    result["update_error"] = lab.error(third_of_one_process)

    lab = fresh()
    result["restored_extra"] = load_checkpoint(own, lab.chunks, lab.optimizer, topology)
    result["restored_updates"] = lab.optimizer.num_updates
    lab.update()
    result["restored_differs"] = lab.differences(third)

    # One process's checkpoint under this layout, written again, and gone on with.
    lab = fresh()
    load_checkpoint(folder / f"{kind}-one process", lab.chunks, lab.optimizer, topology)
    result["resharded_differs"] = lab.differences(load_file(folder / f"{kind}-one process second.safetensors"))
    save_checkpoint(checkpoint(f"rewritten-{layout}"), lab.chunks, lab.optimizer, topology, {})
    lab.update()
    result["continued_error"] = lab.error(third_of_one_process)
    return result


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
