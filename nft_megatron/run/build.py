"""Builds everything that a training run consists of, on every rank, and tears it down again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.base.garbage import frozen
from nft_megatron.base.rank_info import is_attempt, rank_info
from nft_megatron.base.records import Prompt, Sampling
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.batching.minibatches import BatchingRules
from nft_megatron.collect.admission import Admission
from nft_megatron.collect.build import open_rollout_client, training_sampling
from nft_megatron.collect.collector import Collector
from nft_megatron.collect.generate_and_grade import RolloutClient
from nft_megatron.collect.logprob_probe import LogprobProbe
from nft_megatron.collect.rules import earlier_rules
from nft_megatron.collect.stream import StreamCollector
from nft_megatron.config.load import dump_config, flatten, load_config
from nft_megatron.config.places import check_places
from nft_megatron.config.schema import Config
from nft_megatron.data.prompts import PromptOrder
from nft_megatron.data.tokenizer import load_tokenizer
from nft_megatron.evaluate.run import evaluate
from nft_megatron.lifecycle.exit_report import remove_exit_report
from nft_megatron.lifecycle.stop_requests import StopRequests
from nft_megatron.lifecycle.walltime import TimeLimit
from nft_megatron.lifecycle.watchdog import LifeSigns, Watchdog
from nft_megatron.model.build import build_model
from nft_megatron.model.control import on_main, together
from nft_megatron.model.load import load_weights
from nft_megatron.model.optimizer import PolicyOptimizer
from nft_megatron.model.settings import check_deterministic
from nft_megatron.model.step import Trainer
from nft_megatron.model.topology import Topology
from nft_megatron.observe.metrics import MetricsLog, MetricsRow, PhaseTimer
from nft_megatron.observe.progress import Progress, open_progress
from nft_megatron.rollout.engine import Engine
from nft_megatron.rollout.fleet.engine import FleetEngine
from nft_megatron.run.checkpoints import Checkpoints
from nft_megatron.run.join import init_distributed
from nft_megatron.run.own_source import keep_source
from nft_megatron.run.questions import read_questions
from nft_megatron.run.rank0 import Rank0Services
from nft_megatron.run.run import Run
from nft_megatron.run.weight_sync import WeightSync
from nft_megatron.verify.modes import check_for_training
from nft_megatron.verify.rules import rules_of
from nft_megatron.weights import ModelShape, read_shape, weight_table
from nft_megatron.weights.hf_reader import HFReader

CHANGEABLE = (
    "run_dir",
    "model.recompute",
    "train.num_steps",
    "train.micro_batch_tokens",
    "train.pad_to_budget",
    "train.max_skipped_updates",
    "optimizer.cpu_offload",
    "fleet",
    "parallel",
    "kernels",
    "deadlines",
    "cluster",
    "slurm",
    "checkpoint",
    "evaluate",
    "observe",
    "verify.url",
    "verify.accept_rules",
    "verify.workers",
    "verify.memory_gib",
    "rollout.processes",
    "rollout.batch_size",
    "rollout.max_rounds",
    "rollout.stream_answers",
    "rollout.deadline_seconds",
    "rollout.step_deadline_seconds",
    "rollout.save_seconds",
    "rollout.max_mismatch",
    "rollout.probe_questions",
    "rollout.probe_tokens",
)
"""What may differ between two starts of one run. Everything else determines what the run computes."""
WAIT_FOR_SERVERS = ("collect", "publish", "evaluate")
"""Phases that may wait for servers."""
LOCK_SECONDS = 60.0
"""Longest wait of an attempt for the lock: the previous attempt's process may still be exiting on another machine."""


@contextlib.contextmanager
def build_run(config: Config) -> Iterator[Run]:
    """The run of ``config``, resumed or new, ready for its next step. Called on every rank.

    All user input is checked before the model is built.
    """
    config = _as_begun(config)
    here = rank_info()
    check_places(config)
    remove_exit_report(config.run_dir, here.rank)
    if here.rank == 0:
        stop = StopRequests(RunFolder(config.run_dir).stop, TimeLimit.of_job(config.deadlines.leave_seconds))
    else:
        stop = StopRequests(None)
    with (
        init_distributed(config) as topology,
        contextlib.ExitStack() as stack,
        stop.watching(),
    ):
        watchdog = Watchdog(config.run_dir, here.rank, longest_silences(config))
        stack.callback(watchdog.close)
        with watchdog.phase("setup"):
            run = _build(config, topology, stop, watchdog, stack)
        with run.progress, run.folder.expected():
            with watchdog.phase("setup"):
                run.start()
            with watchdog.phase("other"), frozen():
                yield run


def _build(config: Config, topology: Topology, stop: StopRequests, watchdog: Watchdog, stack: contextlib.ExitStack) -> Run:
    folder, timer = RunFolder(config.run_dir), PhaseTimer()
    shape = together(topology, lambda: read_shape(config.model.path))
    config.check_context(shape.max_positions)
    services: list[Rank0Services] = []
    on_main(topology, lambda: services.append(_open_rank0_services(config, shape, folder, timer, stop, watchdog, stack)))
    rank0 = services[0] if services else None
    trainer = together(topology, lambda: build_trainer(config, topology, shape))
    run = Run(
        config=config,
        folder=folder,
        topology=topology,
        trainer=trainer,
        weight_sync=WeightSync(trainer, rank0.collector.client.engine if rank0 else None, config.model.path),
        checkpoints=Checkpoints(
            folder,
            trainer,
            config.checkpoint.keep,
            num_best=config.checkpoint.keep_best,
            num_ledgers_kept=config.checkpoint.keep_ledgers,
            asynchronous=config.checkpoint.asynchronous,
            deadline_seconds=config.deadlines.save_seconds,
        ),
        timer=timer,
        progress=rank0.collector.client.progress if rank0 else LifeSigns(Progress(), watchdog),
        watchdog=watchdog,
        stop=stop,
        rank0=rank0,
    )
    stack.callback(run.close)
    return run


def longest_silences(config: Config) -> dict[str, float]:
    """Seconds by phase, for the watchdog, plus the wait for servers, so that the wait ends first and says what is missing."""
    wait = config.fleet.wait_seconds if config.rollout.engine == "vllm" else 0.0
    deadlines = config.deadlines.by_phase
    return {phase: seconds + (wait if phase in WAIT_FOR_SERVERS else 0.0) for phase, seconds in deadlines.items()}


def build_trainer(config: Config, topology: Topology, shape: ModelShape) -> Trainer:
    """The model with the weights of ``config.model.path``, its optimizer and its algorithm, on this rank."""
    rules = _batching_rules(config, topology, shape)
    chunks = build_model(
        shape,
        topology,
        dtype=getattr(torch, config.model.dtype),
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.model.recompute,
        variable_lengths=not config.train.pad_to_budget,
        pack_tokens=rules.token_budget,
        kernels=config.kernels,
    )
    check_deterministic(chunks[0].config, config.max_sequence_tokens, config.train.micro_batch_tokens)
    load_weights(chunks, topology, shape, config.model.path)
    return Trainer(
        topology=topology,
        shape=shape,
        chunks=chunks,
        optimizer=PolicyOptimizer(chunks, config.optimizer),
        algorithm=config.algorithm,
        rules=rules,
        temperature=config.rollout.temperature,
        importance_cap=config.train.importance_cap,
        gradient_cosine_every=config.observe.gradient_cosine_every,
        fused_lm_head=config.kernels.fused_lm_head,
    )


def _batching_rules(config: Config, topology: Topology, shape: ModelShape) -> BatchingRules:
    rules = BatchingRules.of(
        config,
        shape.hidden_size,
        data=topology.data_size,
        tensor=topology.tensor_size,
        context=topology.context_size,
        pipeline=topology.pipeline_size,
        virtual_pipeline=topology.virtual_pipeline,
        token_budget=config.train.micro_batch_tokens,
    )
    if config.max_sequence_tokens > rules.longest_sequence:
        raise UserError(
            "train.micro_batch_tokens",
            rules.token_budget,
            f"packs are multiples of {rules.multiple} here: one holds {rules.longest_sequence} tokens, "
            f"but a sequence may have {config.max_sequence_tokens}",
            f"raise it to at least {-(-config.max_sequence_tokens // rules.multiple) * rules.multiple}",
        )
    return rules


def _open_rank0_services(
    config: Config,
    shape: ModelShape,
    folder: RunFolder,
    timer: PhaseTimer,
    stop: StopRequests,
    watchdog: Watchdog,
    stack: contextlib.ExitStack,
) -> Rank0Services:
    """Rank 0: take the run folder, read the questions, start engine and verifier. ``stack`` closes everything opened here."""
    stack.enter_context(folder.open(wait_seconds=LOCK_SECONDS if is_attempt() else 0.0))
    check_for_training(config.verify.grader)
    _check_same_run(config, folder)
    _check_steps(config, folder)
    earlier = earlier_rules(folder, config.verify)
    keep_source(folder, config.algorithm.name)
    with HFReader(config.model.path) as reader:
        reader.check(weight_table(shape))
    tokenizer = load_tokenizer(config.model.path)
    questions, held_out = read_questions(config, folder, tokenizer)
    progress = LifeSigns(open_progress(config.train.num_steps), watchdog)
    client = open_rollout_client(config, config.model.path, shape, tokenizer, stack, timer, progress, stop.request)
    metrics = MetricsLog(
        folder.root,
        tensorboard=config.observe.tensorboard,
        wandb_project=config.observe.wandb_project,
        config=config.model_dump(mode="json"),
    )
    stack.callback(metrics.close)
    sampling = training_sampling(config, config.model.path, tokenizer)
    folder.make_folders()
    with atomic_file(folder.config) as temporary:
        temporary.write_text(dump_config(config))
    return Rank0Services(
        collector=_collector_class(config)(
            folder,
            PromptOrder(questions.prompts, config.seed),
            client,
            sampling,
            config.rollout,
            filters_prompts=config.filters_prompts,
            left_out=questions.left_out,
            interrupted=stop.reason,
            rules=rules_of(config.verify.grader),
            earlier_rules=earlier,
        ),
        evaluate=(
            (lambda progress: evaluate(replace(client, progress=progress), held_out.prompts, config.evaluate, sampling))
            if held_out.prompts
            else None
        ),
        probe=_open_probe(config, folder, client, questions.prompts, sampling),
        fleet=_fleet_metrics(client.engine),
        metrics=metrics,
    )


def _collector_class(config: Config) -> Callable[..., Collector]:
    if not config.rollout.stream:
        return Collector
    rules = Admission.of(config.rollout, config.train.num_steps, config.filters_prompts)
    return functools.partial(StreamCollector, admission=rules)


def _open_probe(
    config: Config, folder: RunFolder, client: RolloutClient, prompts: Sequence[Prompt], sampling: Sampling
) -> Callable[[int], Path] | None:
    number = config.rollout.probe_questions
    if number is None:
        number = 16 if config.rollout.engine == "vllm" else 0
    probe = LogprobProbe(client.engine, prompts[:number], sampling, config.rollout.probe_tokens, folder.probe, config.seed)
    return probe.ask if number else None


def _fleet_metrics(engine: Engine) -> Callable[[], MetricsRow]:
    return engine.metrics if isinstance(engine, FleetEngine) else dict


def _as_begun(config: Config) -> Config:
    """``config`` with the ``train.minibatch_of`` that its run began with, where it leaves that open."""
    folder = RunFolder(config.run_dir)
    if config.train.minibatch_of or not folder.has_begun:
        return config
    begun = load_config(folder.config).train.minibatch_of
    return config.model_copy(update={"train": config.train.model_copy(update={"minibatch_of": begun})})


def _check_same_run(config: Config, folder: RunFolder) -> None:
    """Refuse to resume a run whose meaning has changed since it first collected answers."""
    if not folder.has_begun:
        return
    before, now = _meaning(load_config(folder.config)), _meaning(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                key,
                now.get(key),
                f"the run in {folder.root} was started with {before.get(key)}",
                f"set it back, or start a new run in another run_dir (only {', '.join(CHANGEABLE)} may change)",
            )


def _meaning(config: Config) -> dict[str, Any]:
    """Everything that may not change, with absolute paths."""
    tree = config.model_dump(mode="json")
    tree["model"]["path"] = str(config.model.path.resolve())
    tree["data"]["train"] = [str(path.resolve()) for path in config.data.train]
    return {
        key: value
        for key, value in flatten(tree).items()
        if not any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)
    }


def _check_steps(config: Config, folder: RunFolder) -> None:
    done = folder.latest_step() or 0
    if config.train.num_steps < done:
        raise UserError(
            "train.num_steps",
            config.train.num_steps,
            f"the run in {folder.root} has already finished {done} steps",
            f"set it to {done} or more, or write an older checkpoint's name into {folder.latest}",
        )
