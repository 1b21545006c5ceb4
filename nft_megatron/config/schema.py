"""What a run is told. Frozen, checked once, at load; nobody changes it afterwards.

Every field's docstring is its help text: ``nft-megatron train --help`` prints them. Reading files and overrides, and turning
a failed check into one readable message, is :mod:`nft_megatron.config.load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from nft_megatron.algorithms import ALGORITHMS, Algorithm
from nft_megatron.base.config_model import ConfigModel, LoosePath, PathList, PositiveFloat, TextList
from nft_megatron.base.errors import UserError
from nft_megatron.config.fleet import FleetConfig
from nft_megatron.config.slurm import SlurmConfig


class ModelConfig(ConfigModel):
    """The model that is trained."""

    path: LoosePath
    """Hugging Face model folder: config.json, safetensors and the tokenizer. Families:
    Qwen2, Qwen2.5, Qwen3, Qwen3-MoE, Llama 2 and 3, Mistral."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it. ``selective``: the MLPs, which hold over half of the
    activations. ``full``: whole layers, of which only the input is kept; a third more work."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations while training. Master weights, log-probs and reductions are float32 either way."""


class DataConfig(ConfigModel):
    """The questions to train on."""

    train: Annotated[PathList, Field(min_length=1)]
    """One or several of: Parquet in the schema of DAPO-Math-17k, JSONL, a local Hugging Face data set folder."""
    template: Literal["chat", "qwen2.5-math", "plain"] = "chat"
    """``chat``: the tokenizer's chat template. ``qwen2.5-math``: the same under Qwen2.5-Math's system message, which asks for
    steps and a \\boxed{} answer. ``plain``: ``plain_format`` alone, for base models without a chat template."""
    plain_format: str = "{question}\n"
    """The prompt under template ``plain``; ``{question}`` is replaced."""
    system_prompt: str | None = None
    """System message in place of the template's own."""
    instruction: Literal["boxed", "answer", "keep", "none"] = "boxed"
    """Of questions in DAPO's wording: ask for \\boxed{} as NFT does, for a line ``Answer: $Answer`` as published, keep either
    as it is, or strip it."""
    conflicting: Literal["drop", "keep"] = "drop"
    """Questions that the data set holds twice with different golds: leave all of them out and count them, or keep them."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt, template included."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with a longer question: refuse to start and name it, or leave such questions out and count them."""


class RolloutConfig(ConfigModel):
    """How answers are collected: lines 5-11 of the paper's Algorithm 1."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """``embedded``: a transformers model beside the trainer, for small models. ``vllm``: the servers of section ``fleet``."""
    questions_per_step: PositiveInt = 512
    """Groups with both right and wrong answers that a rollout step trains on."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """K, answers drawn for each question."""
    temperature: PositiveFloat = 1.0
    """Of sampling. Training log-probs use logits / temperature too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Must stay 1 for training: a renormalised distribution is not the policy π of Eq. 10."""
    max_answer_tokens: PositiveInt = 3584
    """Longer answers are cut there and count as wrong."""
    stop: TextList = ()
    """Texts that end an answer, beside the model's own end-of-text tokens."""
    oversample: Annotated[float, Field(ge=1)] = 3.0
    """Most questions asked in a round, as a multiple of the groups still missing. Fewer are asked once the share of questions
    that turn out mixed is known from earlier rounds."""
    prompt_filter: bool | None = None
    """Train on questions with right and wrong answers alone (DAPO's dynamic sampling). null: as in the paper, for all
    algorithms but GRPO and Dr. GRPO, whose steps then have questions_per_step questions of any kind."""
    max_rounds: PositiveInt = 10
    """Rounds of questions in a step; after that it trains on the groups it has, with a warning."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Steps by which an answer may be older than the weights it trains. 0: collecting and training alternate, as in the paper;
    surplus groups of a step are thrown away. 1 and more: up to so many steps are collected ahead while others train, surplus
    groups train a later step, and the engine's own log-probs are π_old. Older answers are dropped and counted."""
    stop_at_quota: bool = False
    """End a round as soon as questions_per_step mixed groups are there and break off the rest. Faster where a few answers are
    long; but questions with short answers are then trained more often, and what is trained depends on the engine's timing."""
    give_up_after: Annotated[int, Field(ge=2)] | None = None
    """Abandon a question when so many of its answers are judged and all agree: it is likely to fail the prompt filter. Saves
    tokens; loses questions on which the policy is nearly always right or wrong. null: never."""
    save_seconds: PositiveFloat = 60.0
    """Finished groups of a round under way are written so often; a killed run asks at most the rest again."""
    processes: Annotated[int, Field(ge=0)] | None = None
    """Worker processes of the embedded engine, one thread each. null: one per core. 0: inside the trainer."""
    batch_size: PositiveInt = 128
    """Answers that one engine process decodes at a time."""
    max_mismatch: PositiveFloat = 0.1
    """Largest mean |log-prob of the engine − of the trainer| of the same weights, in nats; beyond it the run ends: the engine
    then serves other weights, another precision or a renormalised distribution."""
    probe_questions: Annotated[int, Field(ge=0)] | None = None
    """Answers to so many fixed questions are asked before the first step and after each publishing, and compared with the
    trainer's log-probs. 0: none. null: 16 with the engine ``vllm``, none with the embedded one."""
    probe_tokens: PositiveInt = 32
    """Longest of these answers."""
    deadline_seconds: PositiveFloat = 3600.0
    """Longest wait for the next finished answer."""
    step_deadline_seconds: PositiveFloat = 86400.0
    """Longest wait of other ranks for rank 0 to collect or evaluate a whole step; a rank 0 that dies is noticed at once."""


class VerifyConfig(ConfigModel):
    """Who says right or wrong."""

    mode: Literal["strict", "math-verify", "dapo", "simplerl"] = "strict"
    """``strict``: the last \\boxed{} alone, integers by exact comparison, the rest by math-verify on the box.
    ``math-verify``: the whole text, as the paper's reference code does. ``dapo``: the "Answer:" line, else the last
    \\boxed{}, in the last 300 characters, exactly the gold. ``simplerl``: the final evaluation's, too lenient to train on
    (it forgives a factor of 100). docs/verification.md compares them."""
    workers: PositiveInt = 2
    """Grader processes; started when the first answer needs math-verify."""
    soft_seconds: PositiveFloat = 1.0
    """CPU time after which a grader gives up by itself, so that a busy machine changes no verdict: unknown."""
    hard_seconds: PositiveFloat = 3.0
    """Wall-clock time after which it is killed and replaced: unknown."""


if TYPE_CHECKING:
    AlgorithmConfig = Algorithm
else:
    AlgorithmConfig = Annotated[
        Union[tuple(ALGORITHMS.values())],  # noqa: UP007 (known only at run time)
        Field(discriminator="name"),
        BeforeValidator(lambda value: {"name": "nft", **value} if isinstance(value, dict) else value),
    ]


class OptimizerConfig(ConfigModel):
    """AdamW with float32 master weights, sharded over data-parallel ranks."""

    learning_rate: PositiveFloat = 1e-6
    """Constant after the warm-up."""
    warmup_updates: Annotated[int, Field(ge=0)] = 10
    """Update t of the first ones has learning rate · t / warmup_updates."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled; biases and norm weights have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    cpu_offload: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of master weights and moments that live, and are updated, in the memory of the host."""

    def learning_rate_at(self, update: int) -> float:
        """learning_rate · min(1, t / warmup_updates) for update t, counted from 1.

        >>> settings = OptimizerConfig(learning_rate=1.0, warmup_updates=4)
        >>> [settings.learning_rate_at(update) for update in (1, 2, 4, 100)]
        [0.25, 0.5, 1.0, 1.0]
        """
        return self.learning_rate * min(1.0, update / max(1, self.warmup_updates))


class TrainConfig(ConfigModel):
    """The loop."""

    num_steps: PositiveInt
    """Rollout steps."""
    updates_per_step: PositiveInt = 16
    """Optimizer steps on each rollout step's groups."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens packed into one forward pass of one data-parallel rank; prompt and answer of every sequence must fit.
    Context-parallel ranks share them out."""
    pad_to_budget: bool = False
    """Pad every pack to micro_batch_tokens: pipeline stages need not tell each other shapes, and memory is the same for all."""
    max_skipped_updates: PositiveInt = 3
    """An update whose loss or gradient is not finite is left out; after so many in a row the run ends with a fault."""
    importance_cap: PositiveFloat | None = None
    """Weight each token by min(π / π_engine, this), π being the trainer's policy of the weights that answered: corrects what
    trainer and engine differ by. null: no such weights."""
    denominator: Literal["tokens", "sequences"] | PositiveFloat = "tokens"
    """D of loss = Σ ω·ℓ / D over a whole mini-batch: its response tokens, its sequences, or a fixed number."""


class ParallelConfig(ConfigModel):
    """How model and sequences are cut. Data-parallel ranks are what is left of the world size."""

    tensor: PositiveInt = 1
    """Tensor-parallel ranks."""
    pipeline: PositiveInt = 1
    """Pipeline stages."""
    virtual_pipeline: PositiveInt = 1
    """Parts of the model that each pipeline stage holds. 2 and more: the interleaved schedule, with a smaller bubble."""
    context: PositiveInt = 1
    """Context-parallel ranks, which share every sequence between them."""
    expert: PositiveInt = 1
    """Of the data- and context-parallel ranks, so many share the experts of each layer. 1: every rank has all experts."""
    sequence_parallel: bool = True
    """Shard activations between tensor-parallel ranks (no effect when tensor is 1)."""
    threads: PositiveInt | None = None
    """CPU threads of a rank. null: the machine's cores divided by its ranks."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest wait in a collective before the run stops with an error."""


class DeadlinesConfig(ConfigModel):
    """Longest silence in each phase of a run. A rank silent for longer leaves its stacks in RUN/logs and ends with 70."""

    setup_seconds: PositiveFloat = 1800.0
    """Building the model, loading weights or a checkpoint, starting the engine."""
    collect_seconds: PositiveFloat = 7200.0
    """On rank 0 the time without a finished answer; the others wait rollout.step_deadline_seconds for rank 0."""
    update_seconds: PositiveFloat = 1800.0
    """One optimizer step, or the old log-probs of a whole step."""
    publish_seconds: PositiveFloat = 1800.0
    """Giving the engine new weights."""
    save_seconds: PositiveFloat = 3600.0
    """Writing a checkpoint or an export."""
    evaluate_seconds: PositiveFloat = 7200.0
    """On rank 0 the time without a finished answer to a held-out question."""
    other_seconds: PositiveFloat = 1800.0
    """Everything else, such as what ranks tell each other between phases."""
    heartbeat_seconds: PositiveFloat = 300.0
    """Under Slurm: rank 0 touches a file, and when it has not for so long the agent of the job ends all ranks."""
    leave_seconds: PositiveFloat = 60.0
    """No silence, but a reserve: where the job's end is known (under Slurm, or from NFT_MEGATRON_END_TIME), the run leaves with
    75 while the time left still has room for this, besides the measured times of a step's updates and of a checkpoint."""

    @property
    def by_phase(self) -> dict[str, float]:
        """Longest silences."""
        others = ("heartbeat_seconds", "leave_seconds")
        return {name.removesuffix("_seconds"): value for name, value in self.model_dump().items() if name not in others}


class ClusterConfig(ConfigModel):
    """Machines, for ``plan`` and ``slurm``; training itself takes the processes that it is started with."""

    gpu: str = "h100"
    """Kind of GPU, one of those that ``plan --help`` lists."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node, connected by NVLink."""
    trainer_nodes: PositiveInt = 1
    """Nodes that train."""
    rollout_nodes: Annotated[int, Field(ge=0)] = 0
    """Nodes that only generate answers. 0: the trainers' nodes do both."""


class CheckpointConfig(ConfigModel):
    """What survives. Written whole or not at all; a run goes on from the newest one by itself."""

    every: PositiveInt = 10
    """Rollout steps between checkpoints; the last step always has one."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    asynchronous: bool = True
    """Write checkpoints while the next step goes on, from a copy in the host's memory. false: wait until they are on the
    disk."""
    export_every: Annotated[int, Field(ge=0)] = 0
    """Rollout steps between Hugging Face exports; 0: only the last step's."""


class EvaluateConfig(ConfigModel):
    """Held-out questions, answered with the current weights while training."""

    data: PathList = ()
    """Same formats as data.train; of a data set folder its test split. Empty: no evaluation."""
    every: PositiveInt = 10
    """Rollout steps between evaluations; also before the first step and after the last."""
    samples: PositiveInt = 1
    """Answers a question; accuracy is their mean (avg@k)."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; here it may be below 1."""


class ObserveConfig(ConfigModel):
    """Where metrics go, beside RUN/metrics.jsonl."""

    tensorboard: bool = True
    """Write RUN/logs/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project (needs the extra ``wandb``)."""
    gradient_cosine_every: Annotated[int, Field(ge=0)] = 0
    """Rollout steps between measurements of the cosine between the gradients of right and of wrong answers; each costs a
    second forward and backward pass of one update. 0: never."""


class Config(ConfigModel):
    """A whole run."""

    run_dir: LoosePath
    """Folder of everything the run writes. Starting again with the same folder goes on where it stopped."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the order of questions, of every answer and of the mini-batches."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    fleet: FleetConfig = FleetConfig()
    verify: VerifyConfig = VerifyConfig()
    algorithm: AlgorithmConfig = ALGORITHMS["nft"](name="nft")
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    cluster: ClusterConfig = ClusterConfig()
    slurm: SlurmConfig = SlurmConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    observe: ObserveConfig = ObserveConfig()

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
                f"{self.algorithm.name} keeps the answers to a question together, and they may have "
                f"rollout.group_size × {self.max_sequence_tokens} = {group_tokens} tokens",
                f"raise it to at least {group_tokens}, or lower rollout.group_size or rollout.max_answer_tokens",
            )
        if self.algorithm.coupling != "token" and train.importance_cap is not None:
            raise UserError(
                "train.importance_cap",
                train.importance_cap,
                f"weights tokens one by one, and the loss of {self.algorithm.name} is of whole answers",
                "leave it at null",
            )
        fleet = self.fleet
        if rollout.engine == "embedded" and (fleet.servers or fleet.urls):
            raise UserError(
                "rollout.engine",
                rollout.engine,
                "asks no servers, and section fleet names some",
                "set rollout.engine=vllm, or leave fleet.servers and fleet.urls empty",
            )
        if not self.filters_prompts and self.algorithm.needs_mixed_groups:
            raise UserError(
                "rollout.prompt_filter",
                rollout.prompt_filter,
                f"{self.algorithm.name} needs it: where all answers agree its loss is zero or not defined",
                "leave it at null",
            )
        if not self.filters_prompts and (rollout.give_up_after is not None or rollout.stop_at_quota):
            field = "stop_at_quota" if rollout.stop_at_quota else "give_up_after"
            raise UserError(
                f"rollout.{field}",
                getattr(rollout, field),
                "looks for mixed questions, and all questions are trained on",
                "leave it out, or set rollout.prompt_filter=true",
            )
        if self.parallel.virtual_pipeline > 1 and self.parallel.pipeline == 1:
            raise UserError(
                "parallel.virtual_pipeline",
                self.parallel.virtual_pipeline,
                "interleaves pipeline stages, and there is one",
                "set parallel.pipeline to 2 or more, or leave it at 1",
            )
        if self.data.template == "plain" and "{question}" not in self.data.plain_format:
            raise UserError(
                "data.plain_format",
                repr(self.data.plain_format),
                "has no {question}, so all prompts would be the same",
                "put {question} where the question belongs",
            )
        if self.data.template == "plain" and self.data.system_prompt is not None:
            raise UserError(
                "data.system_prompt",
                repr(self.data.system_prompt),
                "has no place under data.template = plain",
                "write it into data.plain_format, or set data.template=chat",
            )
        if self.verify.hard_seconds < self.verify.soft_seconds:
            raise UserError(
                "verify.hard_seconds",
                self.verify.hard_seconds,
                f"below verify.soft_seconds = {self.verify.soft_seconds}",
                "a grader must be able to give up by itself before it is killed",
            )
        return self

    @property
    def filters_prompts(self) -> bool:
        """Whether questions on which all answers agree are left out: ``rollout.prompt_filter``, or the algorithm's wish."""
        choice = self.rollout.prompt_filter
        return self.algorithm.needs_mixed_groups if choice is None else choice

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
                f"with data.max_prompt_tokens = {self.data.max_prompt_tokens} it exceeds the model's context",
                f"lower their sum to {max_positions}",
            )
