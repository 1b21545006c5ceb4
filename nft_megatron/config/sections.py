"""The sections of a run configuration. :mod:`nft_megatron.config.schema` puts them together and checks them against each other.

Every field's docstring is its help text: ``nft-megatron train --help`` prints them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from nft_megatron.base.config_model import (
    ConfigModel,
    Count,
    LoosePath,
    PathList,
    PositiveFloat,
    PositiveInt,
    ProcessCount,
    TextList,
)
from nft_megatron.base.errors import UserError
from nft_megatron.base.imported import ImportPath


class ModelConfig(ConfigModel):
    """The model to train."""

    path: LoosePath
    """Hugging Face model folder: config.json, safetensors and the tokenizer. Families:
    Qwen2, Qwen2.5, Qwen3, Qwen3-MoE, Llama 2 and 3, Mistral."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of storing. ``selective``: the MLPs, which hold over half of the
    activations. ``full``: whole layers, storing only their input; a third more work."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and activations during training. Master weights, log-probs and reductions are always float32."""


class DataConfig(ConfigModel):
    """The questions to train on."""

    train: Annotated[PathList, Field(min_length=1)]
    """One or more of: Parquet (DAPO-Math-17k's schema, or columns of any name), JSONL, JSON, CSV, a local Hugging Face dataset
    folder."""
    question_field: str | None = None
    """Column of the question: a text, or a list of {role, content}. A dot leads into a nested row, as in
    ``extra_info.question``. null: the first of prompt, question, problem."""
    answer_field: str | None = None
    """Column of the gold. null: reward_model.ground_truth, or the first of answer, gold, ground_truth, final_answer. GSM8K's
    "… #### 72" is read as 72, a solution that ends in \\boxed{72} too."""
    config_name: str | None = None
    """Config (subset) of a Hugging Face dataset folder that has several."""
    template: Literal["chat", "qwen2.5-math", "plain"] = "chat"
    """``chat``: the tokenizer's chat template. ``qwen2.5-math``: the same with Qwen2.5-Math's system message, which asks for
    steps and a \\boxed{} answer. ``plain``: ``plain_format`` only, for base models without a chat template."""
    plain_format: str = "{question}\n"
    """Prompt of template ``plain``; ``{question}`` is replaced by the question."""
    system_prompt: str | None = None
    """System message that replaces the template's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the tokenizer's chat template: ``data.chat_template_kwargs.enable_thinking=false`` switches Qwen3's thinking
    off."""
    instruction: Literal["boxed", "answer", "keep", "none"] = "boxed"
    """``boxed``: ask every question for \\boxed{}, in DAPO's wording as NFT does, unless the question, a system message or the
    template already does. ``answer``: the same for a line ``Answer: $Answer``, as in DAPO-Math-17k. ``keep``: questions as they
    are. ``none``: without DAPO's wording."""
    conflicting: Literal["drop", "keep"] = "drop"
    """Questions that occur more than once with different golds: drop all of them and count them, or keep them."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt, template included."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with longer prompts: refuse to start and name the first, or drop them and count them."""


class RolloutConfig(ConfigModel):
    """How answers are collected: lines 5-11 of the paper's Algorithm 1."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """``embedded``: a transformers model next to the trainer, for small models. ``vllm``: the servers of section ``fleet``."""
    questions_per_step: PositiveInt = 512
    """Groups with both right and wrong answers that each rollout step trains on."""
    group_size: Annotated[int, Field(ge=2, lt=2**31)] = 16
    """K, the number of answers sampled per question."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. Training log-probs also use logits / temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Must stay 1 for training: a renormalised distribution is not the policy π of Eq. 10."""
    max_answer_tokens: PositiveInt = 3584
    """Longer answers are truncated here and count as wrong, except under verify.mode published-boxed and published-answer."""
    stop: TextList = ()
    """Texts that end an answer, in addition to the model's end-of-text tokens."""
    oversample: Annotated[float, Field(ge=1, le=1000)] = 3.0
    """Upper limit of questions per round, as a multiple of the groups still missing. A round uses fewer once earlier rounds
    have shown the share of mixed questions."""
    prompt_filter: bool | None = None
    """Train only on questions with both right and wrong answers (DAPO's dynamic sampling). null: as in the paper, true for all
    algorithms except GRPO, Dr. GRPO and GSPO, whose steps then have questions_per_step questions of any kind."""
    max_rounds: PositiveInt = 10
    """Rounds of questions per step; after that the step trains on the groups it has, with a warning."""
    max_staleness: Count = 0
    """Steps by which an answer may be older than the weights it trains. 0: collecting and training alternate, as in the paper;
    surplus groups of a step are discarded. 1 or more: up to this many steps are collected ahead during training, surplus
    groups train a later step, and the engine's own log-probs are π_old. Older answers are dropped and counted."""
    stream: bool = False
    """With max_staleness of 1 or more: collect without rounds. stream_answers answers are always in progress, new weights reach
    them on the way, and a step trains on groups that have closed, questions_per_step of them or a few more. No answer becomes
    too old, and no mixed group is thrown away."""
    stream_answers: PositiveInt | None = None
    """Answers in progress in a stream. null: half of those that a step trains on, questions_per_step · group_size / 2."""
    stream_order: Literal["closed", "question"] = "closed"
    """Groups that a step of a stream takes first. ``closed``: those that closed first. ``question``: those asked first; a step
    then waits for its slowest answer."""
    stop_at_quota: bool = False
    """End a round as soon as questions_per_step groups are mixed, and cancel the rest. Faster when a few answers are long, but
    questions with short answers are then trained more often, and the choice depends on the engine's timing."""
    give_up_after: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    """Abandon a question once this many of its answers are judged and all agree: it will probably fail the prompt filter. Saves
    tokens; loses questions on which the policy is nearly always right or wrong. null: never."""
    save_seconds: PositiveFloat = 60.0
    """Time between writes of the current round's finished groups; a killed run regenerates only the rest."""
    processes: Annotated[int, Field(ge=0, le=4096)] | None = None
    """Worker processes of the embedded engine, one thread each. null: one per core. 0: inside the trainer."""
    batch_size: PositiveInt = 128
    """Answers that one engine process decodes at once."""
    max_mismatch: PositiveFloat = 0.1
    """Largest mean |engine log-prob − trainer log-prob| under the same weights, in nats. Beyond it the run ends, because the
    engine serves other weights, another precision or a renormalised distribution."""
    probe_questions: Count | None = None
    """The log-prob probe: before the first step and after each weight update the engine answers this many fixed questions, and
    its log-probs are compared with the trainer's. 0: none. null: 16 with the engine ``vllm``, none with the embedded one."""
    probe_tokens: PositiveInt = 32
    """Longest answer of the probe."""
    deadline_seconds: PositiveFloat = 3600.0
    """Longest wait for the next finished answer."""
    step_deadline_seconds: PositiveFloat = 86400.0
    """Longest wait of the other ranks while rank 0 collects or evaluates a whole step; they notice at once if rank 0 dies."""


def _service_url(url: str) -> str:
    parts = urlsplit(url)
    try:
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:  # the port is no number, or too large
        is_address = False
    if not is_address or parts.query or parts.fragment or any(char.isspace() for char in url):
        raise ValueError("is not the address of a service; write http://127.0.0.1:PORT/PATH")
    return url


BuiltInMode = Literal["strict", "math-verify", "dapo", "published-boxed", "published-answer", "simplerl", "program"]


class VerifyConfig(ConfigModel):
    """How answers are graded."""

    mode: (
        Literal["strict", "math-verify", "dapo", "published-boxed", "published-answer", "simplerl", "program"] | ImportPath
    ) = "strict"
    """``strict``: the last \\boxed{} only, integers by exact comparison, the rest by math-verify on the box.
    ``math-verify``: the whole text. ``dapo``: the "Answer:" line, else the last \\boxed{}, in the last 300 characters, exactly
    the gold. ``published-boxed``, ``published-answer``: the training grader of the authors' code, the text of the last
    \\boxed{} in the last 100 characters, or the "Answer:" line; truncated answers are judged too. ``simplerl``: for final
    evaluations, too lenient to train on (it forgives a factor of 100). docs/verification.md compares them.
    ``program``: the last block of code must pass the tests in the gold, in a sandbox.
    ``my_package.my_module:grade``: your own function of answer, gold and question; docs/own_verifier.md."""
    url: Annotated[str, AfterValidator(_service_url)] | None = None
    """An HTTP service that grades instead of ``mode``: POST {"answer", "gold", "question"}, reply {"verdict"}."""
    accept_rules: str | None = None
    """A run is not resumed under another function, service or source than its answers were graded by, unless this names the new
    rules as the refusal prints them."""
    workers: ProcessCount = 2
    """Grader processes, started when the first answer needs one; requests at a time to ``url``."""
    memory_gib: PositiveFloat = 2.0
    """Address space of a grader process, in GiB. Beyond it the verdict is unknown."""
    soft_seconds: PositiveFloat = 1.0
    """CPU time after which a grader gives up (or, at twice that, is ended by the kernel): verdict unknown. A busy machine
    therefore changes no verdict."""
    hard_seconds: PositiveFloat = 3.0
    """Wall-clock time after which a grader that has not answered is killed and replaced. Its task is tried once more, alone and
    for up to ten times as long, before its verdict is unknown. With ``url``: time for one reply, retries included."""

    @property
    def grader(self) -> str:
        """``url`` if it is set, else ``mode``."""
        return self.url or self.mode

    @classmethod
    def of_grader(cls, grader: str, **others: Any) -> VerifyConfig:
        """The section with a mode, an import path or a URL, as the command line takes them.

        >>> VerifyConfig.of_grader("http://127.0.0.1:8000/grade").grader, VerifyConfig.of_grader("dapo").mode
        ('http://127.0.0.1:8000/grade', 'dapo')
        """
        is_url = grader.startswith(("http://", "https://"))
        return cls.model_validate(others | ({"url": grader, "mode": "strict"} if is_url else {"mode": grader, "url": None}))

    @model_validator(mode="after")
    def _check_one_grader(self) -> VerifyConfig:
        if self.url is not None and self.mode != "strict":
            raise UserError("verify.url", self.url, f"grades instead of verify.mode = {self.mode}", "set only one of them")
        return self


class OptimizerConfig(ConfigModel):
    """AdamW with float32 master weights, sharded over data-parallel ranks."""

    learning_rate: PositiveFloat = 1e-6
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, as in the paper, or falling to ``min_rate`` at update ``decay_updates``."""
    decay_updates: PositiveInt | None = None
    """The update, counted from the run's first, from which on the rate is the smallest. Of a whole run: train.num_steps ·
    train.updates_per_step. Set apart from these, so that a run continued beyond num_steps keeps its schedule."""
    min_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Smallest rate of a falling schedule, as a share of learning_rate."""
    warmup_updates: Count = 10
    """Updates of linear warm-up: update t has learning rate · t / warmup_updates."""
    warmup_stair: PositiveInt | None = None
    """n updates share a rate: update t has learning rate · n·⌊(t − 1)/n⌋ / warmup_updates, so that the first n have 0. The
    authors' code warms up once per rollout step: 16, with warmup_updates=160. null: every update has its own, above 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay; not applied to biases and norm weights."""
    decay_all: bool = False
    """Decay biases and norm weights too, as the authors' code does."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0: no clipping."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which Adam's first moment is kept. bfloat16 saves 2 bytes per parameter, as DeepSeek-V3 did (arXiv 2412.19437,
    section 3.3.3): Megatron-LM's precision-aware optimizer. Needs Transformer Engine; not with cpu_offload."""
    second_moment: Literal["float32", "bfloat16"] = "float32"
    """The same of the second moment; in bfloat16 only with beta2 up to 0.996, or it would stop shrinking."""
    cpu_offload: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of master weights and moments that are kept and updated in host memory."""

    @property
    def has_small_moments(self) -> bool:
        """Whether a moment is kept in fewer bits than float32."""
        return "bfloat16" in (self.first_moment, self.second_moment)

    def learning_rate_at(self, update: int) -> float:
        """learning_rate · min(1, t / W) · decay for update t, counted from 1, with W = warmup_updates; with ``warmup_stair``
        the warm-up is in stairs from 0.

        With p = (t − W) / (decay_updates − W), from 0 to 1, and m = min_rate, the decay is 1 (constant), 1 − (1 − m)·p (linear)
        or m + (1 − m)·(1 + cos πp) / 2 (cosine).

        >>> settings = OptimizerConfig(learning_rate=1.0, warmup_updates=4)
        >>> [settings.learning_rate_at(update) for update in (1, 2, 4, 100)]
        [0.25, 0.5, 1.0, 1.0]
        >>> settings = OptimizerConfig(learning_rate=1.0, warmup_updates=4, warmup_stair=2)
        >>> [settings.learning_rate_at(update) for update in (1, 2, 3, 4, 5, 100)]
        [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
        >>> settings = OptimizerConfig(learning_rate=1.0, warmup_updates=2, schedule="linear", decay_updates=6, min_rate=0.2)
        >>> [round(settings.learning_rate_at(update), 9) for update in (1, 2, 3, 4, 6, 100)]
        [0.5, 1.0, 0.8, 0.6, 0.2, 0.2]
        """
        rate = self.learning_rate * self._decay_at(update)
        if self.warmup_stair is not None:
            update = (update - 1) // self.warmup_stair * self.warmup_stair
            return rate * (min(1.0, update / self.warmup_updates) if self.warmup_updates else 1.0)
        return rate * min(1.0, update / max(1, self.warmup_updates))

    def _decay_at(self, update: int) -> float:
        if self.schedule == "constant":
            return 1.0
        assert self.decay_updates is not None
        passed = min(1.0, max(0.0, (update - self.warmup_updates) / (self.decay_updates - self.warmup_updates)))
        left = 1 - passed if self.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
        return self.min_rate + (1 - self.min_rate) * left

    @model_validator(mode="after")
    def _check_schedule(self) -> OptimizerConfig:
        if self.schedule == "constant" and self.decay_updates is not None:
            problem = "has no effect with optimizer.schedule = constant"
            raise UserError("optimizer.decay_updates", self.decay_updates, problem, "remove it, or set linear or cosine")
        if self.schedule != "constant" and (self.decay_updates or 0) <= self.warmup_updates:
            raise UserError(
                "optimizer.decay_updates",
                self.decay_updates,
                f"must be above optimizer.warmup_updates = {self.warmup_updates} with optimizer.schedule = {self.schedule}",
                "set it to the updates of the whole run, train.num_steps · train.updates_per_step",
            )
        return self


class TrainConfig(ConfigModel):
    """The training loop."""

    num_steps: PositiveInt
    """Rollout steps."""
    updates_per_step: PositiveInt = 16
    """Optimizer updates per rollout step."""
    minibatch_of: Literal["answers", "questions"] | None = None
    """Deal the step's answers out over the mini-batches one by one, or keep the answers to a question together. Dealing
    makes the gradient less noisy: the answers to a question push in similar directions. null: answers; but questions for a loss
    that couples the answers to a question, and in a run that began before this choice existed."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens packed into one forward pass of a data-parallel rank; every prompt with its answer must fit.
    Context-parallel ranks divide them."""
    pad_to_budget: bool = False
    """Pad every pack to micro_batch_tokens: pipeline stages need not exchange shapes, and all packs use the same memory."""
    max_skipped_updates: PositiveInt = 3
    """An update whose loss or gradient is not finite is skipped; after this many in a row the run ends with a fault."""
    importance_cap: PositiveFloat | None = None
    """Weight each token by min(π / π_engine, this), where π is the trainer's policy under the weights that generated the
    answer: corrects the trainer-engine mismatch. null: no such weights."""
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """π_old of answers of the current weights. recompute: a forward pass before the updates. engine: the engine's log-probs, as
    for older answers, without that pass. The first update then measures how far they are from the trainer's; beyond
    rollout.max_mismatch the run ends before anything of the step is saved or published."""
    denominator: Literal["tokens", "sequences"] | PositiveFloat = "tokens"
    """D in loss = Σ ω·ℓ / D over a whole mini-batch: its response tokens, its sequences, or a fixed number."""


class ParallelConfig(ConfigModel):
    """How model and sequences are split. The remaining factor of the world size is data parallel."""

    tensor: PositiveInt = 1
    """Tensor-parallel ranks."""
    pipeline: PositiveInt = 1
    """Pipeline stages."""
    virtual_pipeline: PositiveInt = 1
    """Parts of the model on each pipeline stage. 2 or more: the interleaved schedule, with a smaller bubble."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage, which also holds the embedding. null: as many as every other stage."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage, which also holds the LM head: fewer than elsewhere make it as fast as the others.
    null: as many as every other stage."""
    context: PositiveInt = 1
    """Context-parallel ranks, which split every sequence."""
    expert: PositiveInt = 1
    """Data- and context-parallel ranks that share the experts of each layer. 1: every rank has all experts."""
    sequence_parallel: bool = True
    """Shard activations between tensor-parallel ranks (no effect when tensor is 1)."""
    threads: ProcessCount | None = None
    """CPU threads per rank. null: the machine's cores divided by its ranks."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest wait in a collective before the run stops with an error."""


class DeadlinesConfig(ConfigModel):
    """Longest silence in each phase of a run. A rank silent for longer writes its stacks to RUN/logs and exits with 70."""

    setup_seconds: PositiveFloat = 1800.0
    """Building the model, loading weights or a checkpoint, starting the engine."""
    collect_seconds: PositiveFloat = 7200.0
    """On rank 0, the time without a finished answer; the other ranks wait rollout.step_deadline_seconds for rank 0."""
    update_seconds: PositiveFloat = 1800.0
    """One optimizer step, or the old log-probs of a whole step."""
    publish_seconds: PositiveFloat = 1800.0
    """Updating the engine's weights."""
    save_seconds: PositiveFloat = 3600.0
    """Writing a checkpoint or an export."""
    evaluate_seconds: PositiveFloat = 7200.0
    """On rank 0, the time without a finished answer to a held-out question."""
    other_seconds: PositiveFloat = 1800.0
    """Everything else, such as communication between phases."""
    heartbeat_seconds: PositiveFloat = 300.0
    """Under Slurm, rank 0 touches a file; when it has not done so for this long, the job's agent ends all ranks."""
    leave_seconds: PositiveFloat = 60.0
    """A reserve rather than a silence: where the job's end is known (from Slurm or NFT_MEGATRON_END_TIME), the run exits with
    75 while there is still time for this plus the measured times of a step's updates and a checkpoint."""

    @property
    def by_phase(self) -> dict[str, float]:
        """Longest silences."""
        others = ("heartbeat_seconds", "leave_seconds")
        return {name.removesuffix("_seconds"): value for name, value in self.model_dump().items() if name not in others}


class ClusterConfig(ConfigModel):
    """Cluster shape for ``plan`` and ``slurm``; training uses the launched processes."""

    gpu: str = "h100"
    """Kind of GPU; ``plan --help`` lists them."""
    gpus_per_node: PositiveInt = 8
    """GPUs per node, connected by NVLink."""
    trainer_nodes: PositiveInt = 1
    """Nodes that train."""
    rollout_nodes: Count = 0
    """Nodes that only generate answers. 0: the engine runs beside the trainers (the embedded one), on GPUs that fleet.devices
    names, or at fleet.urls."""
    node_memory_gb: PositiveFloat = 2000.0
    """Host memory of a node, in GB of 10^9 bytes. The default is a DGX H100's; ``plan`` refuses a run that needs more."""
    filesystem_gb_per_second: PositiveFloat = 10.0
    """GB/s at which all nodes together read or write the shared file system of run_dir. The default suits a small parallel file
    system; large ones reach 50 and more."""


class CheckpointConfig(ConfigModel):
    """Checkpoints, and what else of a run folder is kept. A checkpoint is written completely or not at all; a run resumes from
    the newest by itself."""

    every: PositiveInt = 10
    """Rollout steps between checkpoints; the last step always has one."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints to keep."""
    keep_best: Count = 0
    """How many checkpoints to keep in addition: those of the highest held-out accuracy, of steps that were evaluated
    (``evaluate.every``). ``checkpoints/best`` names the best of all that are there."""
    asynchronous: bool = True
    """Write checkpoints during the next step, from a copy in host memory. false: wait until they are on disk."""
    export_every: Count = 0
    """Rollout steps between Hugging Face exports; 0: only the last step's."""
    keep_exports: PositiveInt | None = None
    """How many of the newest exports to keep. null: all."""
    keep_ledgers: PositiveInt | None = None
    """How many of the newest ledgers to keep, in addition to those that a kept checkpoint may need. null: all, for audits, the
    report and `replay`."""


class EvaluateConfig(ConfigModel):
    """Evaluation on held-out questions during training, with the current weights."""

    data: PathList = ()
    """Same formats as data.train; a dataset folder contributes its test split. Empty: no evaluation."""
    every: PositiveInt = 10
    """Rollout steps between evaluations; also before the first step and after the last."""
    samples: PositiveInt = 1
    """Answers per question; accuracy is their mean (avg@k)."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; here it may be below 1."""


class ObserveConfig(ConfigModel):
    """Where metrics go, in addition to RUN/metrics.jsonl."""

    tensorboard: bool = True
    """Also write TensorBoard files to RUN/logs/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project (needs the extra ``wandb``)."""
    gradient_cosine_every: Count = 0
    """Rollout steps between measurements of the cosine between the gradients of right and wrong answers; each costs a
    second forward and backward pass of one update. 0: never."""
