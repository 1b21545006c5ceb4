"""Run configuration. Frozen and checked once, at load; never changed afterwards.

:mod:`nft_megatron.config.load` reads files and overrides and turns a failed check into one readable message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, SerializeAsAny, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from nft_megatron.algorithms import ALGORITHMS, Algorithm, imported_algorithm
from nft_megatron.base.config_model import ConfigModel, LoosePath
from nft_megatron.base.errors import UserError
from nft_megatron.base.imported import is_import_path
from nft_megatron.config.fleet import FleetConfig
from nft_megatron.config.kernels import KernelsConfig
from nft_megatron.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    DeadlinesConfig,
    EvaluateConfig,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
    VerifyConfig,
)
from nft_megatron.config.slurm import SlurmConfig

DEFAULT_ALGORITHM = "nft"


def _algorithm(value: Any, of_this_project: ValidatorFunctionWrapHandler) -> Any:
    """A section ``algorithm`` as the algorithm that it names, which may be a user's own."""
    if isinstance(value, Algorithm):
        return value
    if isinstance(value, dict):
        value = {"name": DEFAULT_ALGORITHM, **value}
        if isinstance(value["name"], str) and is_import_path(value["name"]):
            return imported_algorithm(value["name"], value)
    return of_this_project(value)


if TYPE_CHECKING:
    AlgorithmConfig = Algorithm
else:
    AlgorithmConfig = Annotated[
        Union[tuple(ALGORITHMS.values())],  # noqa: UP007 (known only at run time)
        Field(discriminator="name"),
        WrapValidator(_algorithm),
        SerializeAsAny(),
    ]

_MOST_ANSWERS = 1 << 24
"""In a step, where the paper has 8,192: each is held in memory."""


class Config(ConfigModel):
    """A whole run."""

    run_dir: LoosePath
    """Folder for everything the run writes. A new start with the same folder resumes where the run stopped."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the order of questions, of every answer and of the mini-batches; 64 bits, as torch takes them."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    fleet: FleetConfig = Field(default_factory=FleetConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    algorithm: AlgorithmConfig = Field(default_factory=ALGORITHMS[DEFAULT_ALGORITHM])
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    deadlines: DeadlinesConfig = Field(default_factory=DeadlinesConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    observe: ObserveConfig = Field(default_factory=ObserveConfig)

    @model_validator(mode="after")
    def _check_across_fields(self) -> Config:
        rollout, train = self.rollout, self.train
        if rollout.top_p != 1.0:
            raise UserError(
                "rollout.top_p",
                rollout.top_p,
                "training answers must come from the policy itself, not a renormalised one",
                "leave it at 1.0 (evaluate.top_p may differ)",
            )
        if rollout.questions_per_step % train.updates_per_step:
            raise UserError(
                "train.updates_per_step",
                train.updates_per_step,
                f"does not divide rollout.questions_per_step = {rollout.questions_per_step}",
                "choose a divisor, so that every update has the same number of questions",
            )
        if (num_answers := rollout.questions_per_step * rollout.group_size) > _MOST_ANSWERS:
            raise UserError(
                "rollout.questions_per_step",
                rollout.questions_per_step,
                f"times rollout.group_size = {rollout.group_size} are {num_answers:,} answers in a step",
                f"lower one of them, to {_MOST_ANSWERS:,} answers or fewer",
            )
        if self.max_sequence_tokens > train.micro_batch_tokens:
            raise UserError(
                "train.micro_batch_tokens",
                train.micro_batch_tokens,
                f"a sequence may have data.max_prompt_tokens + rollout.max_answer_tokens = {self.max_sequence_tokens} tokens",
                f"raise it to at least {self.max_sequence_tokens}, or lower those two",
            )
        group_tokens = rollout.group_size * self.max_sequence_tokens
        if self.algorithm.coupling == "group" and group_tokens > train.micro_batch_tokens:
            raise UserError(
                "train.micro_batch_tokens",
                train.micro_batch_tokens,
                f"{self.algorithm.name} keeps the answers to a question together, and these may take "
                f"rollout.group_size × {self.max_sequence_tokens} = {group_tokens} tokens",
                f"raise it to at least {group_tokens}, or lower rollout.group_size or rollout.max_answer_tokens",
            )
        if self.algorithm.coupling == "group" and train.minibatch_of == "answers":
            raise UserError(
                "train.minibatch_of",
                train.minibatch_of,
                f"the loss of {self.algorithm.name} couples the answers to a question",
                "leave it out, or use questions",
            )
        if self.algorithm.coupling != "token" and train.importance_cap is not None:
            raise UserError(
                "train.importance_cap",
                train.importance_cap,
                f"weights single tokens, but the loss of {self.algorithm.name} is over whole answers",
                "set it to null",
            )
        if train.importance_cap is not None and train.old_logprobs == "engine":
            raise UserError(
                "train.importance_cap",
                train.importance_cap,
                "weights tokens by π / π_engine, but train.old_logprobs = engine takes π_engine for π",
                "set it to null, or train.old_logprobs=recompute",
            )
        fleet = self.fleet
        if rollout.engine == "embedded" and (fleet.servers or fleet.urls):
            raise UserError(
                "rollout.engine",
                rollout.engine,
                "uses no servers, but section fleet names some",
                "set rollout.engine=vllm, or leave fleet.servers and fleet.urls empty",
            )
        if not self.filters_prompts and self.algorithm.needs_mixed_groups:
            raise UserError(
                "rollout.prompt_filter",
                rollout.prompt_filter,
                f"{self.algorithm.name} needs it: where all answers agree, its loss is zero or undefined",
                "set it to null",
            )
        if not self.filters_prompts and (rollout.give_up_after is not None or rollout.stop_at_quota):
            field = "stop_at_quota" if rollout.stop_at_quota else "give_up_after"
            raise UserError(
                f"rollout.{field}",
                getattr(rollout, field),
                "looks for mixed questions, but training uses all questions",
                "remove it, or set rollout.prompt_filter=true",
            )
        if rollout.stream:
            self._check_stream()
        if self.parallel.virtual_pipeline > 1 and self.parallel.pipeline == 1:
            raise UserError(
                "parallel.virtual_pipeline",
                self.parallel.virtual_pipeline,
                "interleaves pipeline stages, but there is only one",
                "set parallel.pipeline to 2 or more, or this to 1",
            )
        parallel = self.parallel
        for field in ("first_stage_layers", "last_stage_layers"):
            if getattr(parallel, field) is not None and parallel.pipeline == 1:
                raise UserError(
                    f"parallel.{field}",
                    getattr(parallel, field),
                    "divides the layers between pipeline stages, but there is only one",
                    "set parallel.pipeline to 2 or more, or this to null",
                )
        if self.data.template == "plain" and "{question}" not in self.data.plain_format:
            raise UserError(
                "data.plain_format",
                repr(self.data.plain_format),
                "has no {question}, so all prompts would be identical",
                "put {question} where the question goes",
            )
        if self.data.template == "plain" and self.data.system_prompt is not None:
            raise UserError(
                "data.system_prompt",
                repr(self.data.system_prompt),
                "has no effect with data.template = plain",
                "write it into data.plain_format, or set data.template=chat",
            )
        if self.data.template == "plain" and self.data.chat_template_kwargs:
            raise UserError(
                "data.chat_template_kwargs",
                self.data.chat_template_kwargs,
                "has no effect with data.template = plain",
                "remove it, or set data.template=chat",
            )
        self._check_moments()
        self._check_tensor_overlap()
        if self.checkpoint.keep_best and not self.evaluate.data:
            raise UserError(
                "checkpoint.keep_best",
                self.checkpoint.keep_best,
                "goes by held-out accuracy, but evaluate.data is empty",
                "name held-out questions in evaluate.data, or set it to 0",
            )
        if self.verify.hard_seconds < self.verify.soft_seconds:
            raise UserError(
                "verify.hard_seconds",
                self.verify.hard_seconds,
                f"below verify.soft_seconds = {self.verify.soft_seconds}",
                "raise it above that, so that a grader can give up before it is killed",
            )
        return self

    def _check_moments(self) -> None:
        """A moment m ← β·m + (1 − β)·x keeps its value under x = 0 if (1 − β)·m rounds to nothing, below 2⁻⁸·m in bfloat16."""
        optimizer = self.optimizer
        for field, moment, beta in (
            ("first_moment", optimizer.first_moment, "beta1"),
            ("second_moment", optimizer.second_moment, "beta2"),
        ):
            if moment == "float32":
                continue
            problem, remedy, kept = "", "set it to float32", getattr(optimizer, beta)
            if self.model.dtype == "float32":
                problem = "needs a bfloat16 model: Transformer Engine's layers and optimizer are not used for float32 ones"
            elif optimizer.cpu_offload:
                problem = f"is kept on the GPU, but optimizer.cpu_offload = {optimizer.cpu_offload}"
                remedy += ", or optimizer.cpu_offload=0"
            elif 1 - kept < 2**-8:
                problem = f"would stop shrinking with optimizer.{beta} = {kept}, as 1 − {beta} is below its rounding"
                remedy += f", or lower optimizer.{beta} to 0.996 or less"
            if problem:
                raise UserError(f"optimizer.{field}", moment, problem, remedy)

    def _check_tensor_overlap(self) -> None:
        parallel, field = self.parallel, "kernels.overlap_tensor_communication"
        if not self.kernels.overlap_tensor_communication:
            return
        if not 1 < parallel.tensor <= self.cluster.gpus_per_node:
            raise UserError(
                field,
                True,
                f"needs 2 to cluster.gpus_per_node = {self.cluster.gpus_per_node} tensor ranks, which share a node; "
                f"parallel.tensor = {parallel.tensor}",
                "set it to false, or change parallel.tensor",
            )
        if not parallel.sequence_parallel:
            raise UserError(
                field, True, "exchanges what sequence parallelism splits", "set it to false, or parallel.sequence_parallel=true"
            )
        if not self.train.pad_to_budget:
            raise UserError(
                field, True, "has buffers of one size, but packs have many", "set it to false, or train.pad_to_budget=true"
            )

    def _check_stream(self) -> None:
        rollout = self.rollout
        if not rollout.max_staleness:
            problem = "needs answers that may be older than the weights they train, but rollout.max_staleness = 0"
            raise UserError("rollout.stream", True, problem, "set rollout.max_staleness=1 or more, or this to false")
        for field in ("stop_at_quota", "give_up_after"):
            if value := getattr(rollout, field):
                raise UserError(f"rollout.{field}", value, "ends a round early, but rollout.stream has no rounds", "remove it")
        if rollout.engine == "vllm" and self.fleet.in_flight == "finish":
            problem = "lets all answers end before new weights, but with rollout.stream there are always answers in progress"
            raise UserError("fleet.in_flight", "finish", problem, "set fleet.in_flight=continue")

    @property
    def filters_prompts(self) -> bool:
        """Whether questions on which all answers agree are dropped: ``rollout.prompt_filter`` or the algorithm's need."""
        choice = self.rollout.prompt_filter
        return self.algorithm.needs_mixed_groups if choice is None else choice

    @property
    def keeps_partial(self) -> bool:
        """``fleet.keep_partial``, or what null stands for."""
        choice = self.fleet.keep_partial
        return self.rollout.max_staleness > 0 if choice is None else choice

    @property
    def minibatch_of(self) -> Literal["answers", "questions"]:
        """``train.minibatch_of``, or what null stands for."""
        return self.train.minibatch_of or ("questions" if self.algorithm.coupling == "group" else "answers")

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus longest answer, in tokens."""
        return self.data.max_prompt_tokens + self.rollout.max_answer_tokens

    def check_context(self, max_positions: int) -> None:
        """Raise ``UserError`` where a sequence may be longer than a model's context of ``max_positions`` tokens."""
        if self.max_sequence_tokens > max_positions:
            raise UserError(
                "rollout.max_answer_tokens",
                self.rollout.max_answer_tokens,
                f"together with data.max_prompt_tokens = {self.data.max_prompt_tokens} it exceeds the model's context",
                f"lower their sum to at most {max_positions}",
            )
