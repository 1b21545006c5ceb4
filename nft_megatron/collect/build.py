"""Builds what rank 0 collects with from the configuration: prompts, sampling, engine and verifier."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Question, Sampling
from nft_megatron.collect.generate_and_grade import RolloutClient
from nft_megatron.config.schema import Config
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.gold_check import Unmatched, counts_of, refuse_unmatched, unmatched_golds
from nft_megatron.data.prompts import PromptSet, make_prompts
from nft_megatron.data.questions import HELD_OUT_SPLIT, TRAIN_SPLIT, Columns, read_data_set
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


def columns_of(config: Config, field: str) -> Columns:
    """Where questions and golds are. Held-out data may have other columns than the training data, under their usual names."""
    data = config.data
    return Columns(data.question_field, data.answer_field, data.config_name, is_required=field == "data.train")


def read_prompts(
    config: Config, tokenizer: Any, field: str, now: datetime | None = None, *, is_v0_1: bool = False
) -> PromptSet:
    """The prompts of the data sets that ``field`` (``data.train`` or ``evaluate.data``) lists; empty when it lists none.

    Questions whose gold right answers may not match are left out; :class:`UserError` if they are more than 1 %. ``now`` is the
    date for templates that print it. ``is_v0_1``: as version 0.1 did, which left out no golds and gave its instruction only to
    questions in DAPO's wording.
    """
    is_train = field == "data.train"
    paths = config.data.train if is_train else config.evaluate.data
    if not paths:
        return PromptSet()
    data = read_data_set(paths, field, TRAIN_SPLIT if is_train else HELD_OUT_SPLIT, columns_of(config, field))
    unmatched = {} if is_v0_1 else unmatched_questions(data.questions, config.verify, field)
    questions = [question for question in data.questions if question.gold not in unmatched]
    left_out = [unmatched[question.gold] for question in data.questions if question.gold in unmatched]
    prompts = make_prompts(questions, tokenizer, config.data, field, now, instructs_all=not is_v0_1)
    prompts = replace(prompts, unmatched=Counter(gold.kind for gold in left_out), num_rows=data.num_rows)
    if left_out:
        counts = counts_of(left_out)
        log.warning("%s: %d golds that right answers may not match are left out (%s)", field, len(left_out), counts)
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


def unmatched_questions(questions: Sequence[Question], settings: VerifyConfig, field: str) -> dict[str, Unmatched]:
    """The golds of ``questions`` that the verifier does not match in every spelling.

    Raises :class:`UserError` if more than 1 % of the questions have such a gold.
    """
    with Verifier(settings) as verifier:
        unmatched = unmatched_golds((question.gold for question in questions), verifier)
    refuse_unmatched(
        ((question.gold, question.place or question.question_id) for question in questions),
        unmatched,
        field,
        f"verify.mode={settings.grader}",
        "name the column of the final answers with data.answer_field, correct them, or choose another verify.mode",
    )
    return unmatched


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


def open_engine(
    config: Config, model_folder: Path, shape: ModelShape, interrupted: Callable[[], str | None] = lambda: None
) -> Engine:
    """The engine named by ``rollout.engine`` for the model in ``model_folder``. It has no weights yet.

    ``interrupted`` gives a reason to end a wait for servers, or None.
    """
    if config.rollout.engine == "vllm":
        from nft_megatron.rollout.fleet.engine import FleetEngine
        from nft_megatron.rollout.fleet.settings import open_fleet, outstanding_tokens

        return FleetEngine(
            open_fleet(config, interrupted),
            model_folder,
            budget_tokens=outstanding_tokens(config, shape),
            silence_seconds=config.fleet.answer_seconds,
            servers_seconds=config.fleet.wait_seconds,
            keep_partial=config.keeps_partial,
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
    interrupted: Callable[[], str | None] = lambda: None,
) -> RolloutClient:
    """A client with the engine and the verifier of ``config``; ``stack`` closes both. ``interrupted``: as of the engine."""
    engine = open_engine(config, model_folder, shape, interrupted)
    stack.callback(engine.close)
    if config.rollout.max_staleness and not engine.overlaps:
        engine = ExclusiveEngine(engine, config.rollout.step_deadline_seconds)
    verifier = stack.enter_context(Verifier(config.verify))
    verifier.check()
    return RolloutClient(engine, verifier, tokenizer, config.seed, config.rollout.deadline_seconds, timer, progress)
