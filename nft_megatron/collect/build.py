"""Builds what rank 0 collects with from the configuration: prompts, sampling, engine and verifier."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Sampling
from nft_megatron.collect.generate_and_grade import RolloutClient
from nft_megatron.config.schema import Config
from nft_megatron.data.prompts import PromptSet, make_prompts
from nft_megatron.data.questions import HELD_OUT_SPLIT, TRAIN_SPLIT, load_questions
from nft_megatron.data.tokenizer import stop_token_ids
from nft_megatron.observe.metrics import PhaseTimer
from nft_megatron.observe.progress import Progress
from nft_megatron.rollout.embedded import EmbeddedEngine
from nft_megatron.rollout.engine import Engine
from nft_megatron.rollout.exclusive import ExclusiveEngine
from nft_megatron.verify.service import Verifier
from nft_megatron.weights import ModelShape

log = logging.getLogger(__name__)


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def read_prompts(config: Config, tokenizer: Any, field: str) -> PromptSet:
    """The prompts of the datasets listed in ``field`` (``data.train`` or ``evaluate.data``); empty if it lists none."""
    is_train = field == "data.train"
    paths = config.data.train if is_train else config.evaluate.data
    if not paths:
        return PromptSet()
    questions = load_questions(paths, field, TRAIN_SPLIT if is_train else HELD_OUT_SPLIT)
    prompts = make_prompts(questions, tokenizer, config.data, field)
    if prompts.num_conflicting or prompts.num_overlong:
        log.warning(
            "%s: of %d questions, %d are left out because they also occur with another gold answer, %d because they are longer "
            "than %d tokens",
            field,
            prompts.num_questions,
            prompts.num_conflicting,
            prompts.num_overlong,
            config.data.max_prompt_tokens,
        )
    return prompts


def training_sampling(config: Config, model_folder: Path, tokenizer: Any) -> Sampling:
    """How to sample the answers to train on."""
    rollout, end = config.rollout, stop_token_ids(model_folder, tokenizer)
    if not end and not rollout.stop:
        raise UserError(
            "rollout.stop",
            "[]",
            f"{model_folder} names no end-of-text token either, so no answer would end",
            "add eos_token_id to its generation_config.json, or set rollout.stop to a text that ends an answer",
        )
    return Sampling(rollout.temperature, rollout.top_p, rollout.max_answer_tokens, end, rollout.stop)


def open_engine(config: Config, model_folder: Path, shape: ModelShape) -> Engine:
    """The engine named by ``rollout.engine`` for the model in ``model_folder``. It has no weights yet."""
    if config.rollout.engine == "vllm":
        from nft_megatron.rollout.fleet.engine import FleetEngine
        from nft_megatron.rollout.fleet.settings import open_fleet

        return FleetEngine(
            open_fleet(config),
            model_folder,
            budget_tokens=config.fleet.outstanding_tokens,
            silence_seconds=config.fleet.answer_seconds,
            servers_seconds=config.fleet.wait_seconds,
        )
    return EmbeddedEngine(
        model_folder,
        shape,
        num_processes=config.rollout.processes if config.rollout.processes is not None else num_cores(),
        batch_size=config.rollout.batch_size,
        dtype=getattr(torch, config.model.dtype),
        answer_seconds=config.rollout.deadline_seconds,
    )


def open_rollout_client(
    config: Config,
    model_folder: Path,
    shape: ModelShape,
    tokenizer: Any,
    stack: contextlib.ExitStack,
    timer: PhaseTimer,
    progress: Progress,
) -> RolloutClient:
    """A client with the engine and the verifier of ``config``; ``stack`` closes both."""
    engine = open_engine(config, model_folder, shape)
    stack.callback(engine.close)
    if config.rollout.max_staleness and not engine.overlaps:
        engine = ExclusiveEngine(engine, config.rollout.step_deadline_seconds)
    verifier = stack.enter_context(Verifier(config.verify))
    return RolloutClient(engine, verifier, tokenizer, config.seed, config.rollout.deadline_seconds, timer, progress)
