"""``nft-megatron eval``: measures the model in a Hugging Face folder on a config's held-out questions or on benchmarks."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nft_megatron.base.atomic_io import atomic_file, remove_leftovers
from nft_megatron.base.errors import UserError
from nft_megatron.base.paths import expand
from nft_megatron.base.records import Group, Sampling
from nft_megatron.collect.build import columns_of, open_rollout_client, read_prompts, training_sampling
from nft_megatron.collect.generate_and_grade import RolloutClient
from nft_megatron.config.load import config_from
from nft_megatron.config.schema import Config
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.gold_check import by_themselves, counts_of, refuse_unmatched, unmatched_golds
from nft_megatron.data.ledger import write_ledger
from nft_megatron.data.overlap import read_overlapping_ids
from nft_megatron.data.prompts import tokenize
from nft_megatron.data.questions import HELD_OUT_SPLIT, load_questions
from nft_megatron.data.tokenizer import load_tokenizer
from nft_megatron.data.wording import instruct, reword
from nft_megatron.evaluate.benchmarks import TOP_P, Benchmark, find_benchmarks, temperature_for
from nft_megatron.evaluate.beside import Comparison, read_scores, scores_of
from nft_megatron.evaluate.measure import Part, Task, answer_part, check_part, plan_parts, questions_hash, read_answers
from nft_megatron.evaluate.run import Evaluation, evaluate
from nft_megatron.evaluate.summary import reasons_table, summary_of, table_of
from nft_megatron.observe.metrics import PhaseTimer
from nft_megatron.observe.progress import open_progress
from nft_megatron.verify.modes import mode_of
from nft_megatron.verify.rules import rules_of
from nft_megatron.verify.service import Verifier
from nft_megatron.weights import ModelShape, num_parameters, read_shape, weight_table
from nft_megatron.weights.hf_reader import HFReader, refuse_non_finite

log = logging.getLogger(__name__)

_SOFT_SECONDS, _HARD_SECONDS = 10.0, 120.0


def evaluate_folder(config: Config, model_folder: Path | str, out: Path | None = None) -> Evaluation:
    """Print the accuracy of ``model_folder`` on ``config.evaluate.data`` with its standard error and the verdicts by reason.

    ``out``, a folder, gets ``summary.json`` and ``answers.parquet``, which has every answer in the format of the ledger. If its
    name ends in .json, the summary goes there and the answers next to it.

    Returns the judged answers. Raises :class:`UserError` without held-out questions or a complete model folder.
    """
    if not config.evaluate.data:
        raise UserError(
            "evaluate.data",
            "(nothing)",
            "names no questions to evaluate on",
            "name a file: evaluate.data=questions.parquet, or measure benchmarks: --benchmarks FOLDER",
        )
    model_folder = expand(model_folder)
    tokenizer = load_tokenizer(model_folder, "MODEL")
    prompts = read_prompts(config, tokenizer, "evaluate.data").prompts
    shape = read_shape(model_folder, "MODEL")
    with _open_model(config, model_folder, shape, tokenizer, num_steps=1) as (client, _):
        result = evaluate(client, prompts, config.evaluate, training_sampling(config, model_folder, tokenizer))
    summary = {
        "model": str(model_folder),
        "data": [str(path) for path in config.evaluate.data],
        "questions": len(prompts),
        "samples": config.evaluate.samples,
        "temperature": config.evaluate.temperature,
        "accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "truncated_rate": result.truncated_rate,
        "unknown_rate": result.unknown_rate,
        "answer_length_mean": result.answer_length_mean,
        "verifier": rules_of(config.verify.grader),
        "reasons": result.reasons,
    }
    if out is not None:
        path = out if out.suffix == ".json" else out / "summary.json"
        answers = out.with_suffix(".parquet") if out.suffix == ".json" else out / "answers.parquet"
        answers.parent.mkdir(parents=True, exist_ok=True)
        groups = [Group(i, 0, prompt, own) for i, (prompt, own) in enumerate(zip(prompts, result.answers, strict=True))]
        write_ledger(answers, groups, fates=["sampled"] * len(groups), meta={"summary": summary})
        _write_json(path, summary)
    print(
        f"{model_folder}: {result.accuracy:.1%} ± {result.standard_error:.1%} of {len(prompts)} questions correct "
        f"(avg@{config.evaluate.samples}, temperature {config.evaluate.temperature:g}), {result.truncated_rate:.1%} cut off"
    )
    print(reasons_table({"answers": result}))
    if out is not None:
        print(f"{path}, and every answer in {answers}")
    return result


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command line. None means each benchmark's own k, the paper's temperature for the model's size, or the
    answer length of training. ``out`` is a folder for answers and summary, ``overlap`` a file from ``nft-megatron overlap``,
    ``beside`` files whose scores are printed beside these.

    >>> BenchmarkOptions((Path("benchmarks"),), Path("eval/model"), samples=4).grader
    'simplerl'
    """

    paths: tuple[Path, ...]
    out: Path
    samples: int | None = None
    temperature: float | None = None
    top_p: float = TOP_P
    max_answer_tokens: int | None = None
    grader: str = "simplerl"
    overlap: Path | None = None
    beside: tuple[Path, ...] = ()
    instruction: Literal["boxed", "answer", "keep", "none"] | None = None
    """``boxed``, ``answer``, ``keep`` or ``none``, as ``data.instruction``, for every benchmark.

    None: as in the paper, AIME and AMC in the wording of training; other files as they stand.
    """


def default_config(model_folder: Path, run_dir: Path, overrides: Sequence[str]) -> Config:
    """The config of a benchmark evaluation without CONFIG: every field's default, and the template that the model has."""
    template = "chat" if load_tokenizer(model_folder, "MODEL").chat_template else "plain"
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"path": str(model_folder)},
        "data": {"train": ["(nothing)"], "template": template},
        "train": {"num_steps": 1},
    }
    return config_from(tree, overrides)


def evaluate_benchmarks(config: Config, model_folder: Path, options: BenchmarkOptions) -> None:
    """Measure ``model_folder`` on benchmarks, print a table and write ``summary.json``; resumes where a killed call stopped.

    Prompts and lengths are those of ``config``. Raises :class:`UserError` for what the user can fix, such as answers in
    ``options.out`` from other settings.
    """
    overlapping = read_overlapping_ids(options.overlap, "--overlap") if options.overlap else frozenset[str]()
    others = [scores for path in options.beside for scores in read_scores(path)]
    config = _with_grader(config, options.grader)
    shape, tokenizer = read_shape(model_folder, "MODEL"), load_tokenizer(model_folder, "MODEL")
    sampling = _sampling(config, model_folder, shape, tokenizer, options)
    tasks = [_read_task(benchmark, path, config, tokenizer, options) for benchmark, path in find_benchmarks(options.paths)]
    unmatched = _unmatched(tasks, config.verify)
    asked = {prompt.question_id for task in tasks for prompt in task.prompts}
    if overlapping and not overlapping & asked:
        log.warning("%s: none of its questions are in these benchmarks; was it made from the same files?", options.overlap)
    parts = [plan_parts(task, sampling.max_tokens, shape.max_positions, options.out) for task in tasks]
    _answer(parts, config, model_folder, shape, tokenizer, sampling)
    results = [(task.benchmark, read_answers(own)) for task, own in zip(tasks, parts, strict=True)]
    settings = {"grader": options.grader, "rules": rules_of(options.grader), "sampling": asdict(sampling), "seed": config.seed}
    summary = {"name": str(model_folder), **settings, **summary_of(results, overlapping), "unmatched_golds": unmatched}
    beside = Comparison.of(scores_of(json.loads(json.dumps(summary))), others) if others else None
    _write_json(options.out / "summary.json", summary | ({"beside": beside.to_json()} if beside else {}))
    print(
        f"{model_folder}, in percent (temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, at most "
        f"{sampling.max_tokens} tokens, grader {options.grader})\n"
    )
    print(table_of(results, overlapping))
    for name, golds in unmatched.items():
        print(f"\n{name} includes {len(golds)} questions whose gold right answers may not match (summary.json names them)")
    print("\n" + reasons_table({benchmark.title: result for benchmark, result in results}))
    if beside:
        print("\n" + beside.tables())
    print(f"\n{options.out}: summary.json, and every answer under answers/")


def _with_grader(config: Config, grader: str) -> Config:
    """``config`` with the evaluation's grader and longer deadlines: an unknown verdict is a hole in the table."""
    mode_of(grader, "--grader")
    verify = config.verify.model_dump(exclude={"mode", "url"}) | {
        "soft_seconds": max(config.verify.soft_seconds, _SOFT_SECONDS),
        "hard_seconds": max(config.verify.hard_seconds, _HARD_SECONDS),
    }
    return config.model_copy(update={"verify": VerifyConfig.of_grader(grader, **verify)})


def _sampling(config: Config, model_folder: Path, shape: ModelShape, tokenizer: Any, options: BenchmarkOptions) -> Sampling:
    for name, value in (("--samples", options.samples), ("--max-answer-tokens", options.max_answer_tokens)):
        if value is not None and value < 1:
            raise UserError(name, value, "is not positive", "use 1 or more")
    return replace(
        training_sampling(config, model_folder, tokenizer),
        temperature=temperature_for(num_parameters(shape)) if options.temperature is None else options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_answer_tokens or config.rollout.max_answer_tokens,
    )


def _read_task(benchmark: Benchmark, path: Path, config: Config, tokenizer: Any, options: BenchmarkOptions) -> Task:
    questions = load_questions([path], "--benchmarks", HELD_OUT_SPLIT, columns_of(config, "--benchmarks"))
    if benchmark.num_questions not in (None, len(questions)):
        log.warning("%s: %s has %d questions, not %d", path, benchmark.title, len(questions), benchmark.num_questions)
    instruction = options.instruction or (config.data.instruction if benchmark.training_wording else "keep")
    if instruction == "boxed" or instruction == "answer":
        questions = [instruct(question, instruction) for question in questions]
    elif instruction == "none":
        questions = [reword(question, instruction) for question in questions]
    as_they_are = config.data.model_copy(update={"instruction": "keep"})
    prompts = tokenize(questions, tokenizer, as_they_are, "--benchmarks")
    return Task(benchmark, tuple(prompts), options.samples or benchmark.samples)


def _unmatched(tasks: Sequence[Task], settings: VerifyConfig) -> dict[str, dict[str, str]]:
    """For each benchmark, the questions whose gold right answers may not match under its grader, with the reason.

    A benchmark's score is over all of its questions, so these are asked too, and a warning names them. Raises
    :class:`UserError` if more than 1 % of a benchmark's golds are not even matched by themselves.
    """
    found: dict[str, dict[str, str]] = {}
    with Verifier(settings) as verifier:
        for task in tasks:
            unmatched = unmatched_golds((prompt.gold for prompt in task.prompts), verifier)
            places = [(prompt.gold, prompt.question_id) for prompt in task.prompts]
            field, remedy = f"--benchmarks ({task.benchmark.title})", "choose another --grader, or remove them from the file"
            refuse_unmatched(places, by_themselves(unmatched), field, f"--grader {settings.grader}", remedy)
            golds = {place: unmatched[gold].kind for gold, place in places if gold in unmatched}
            if golds:
                found[task.benchmark.name] = golds
                log.warning(
                    "%s: right answers may not match %d of %d golds under --grader %s and then count as wrong (%s), such as %s",
                    task.benchmark.title,
                    len(golds),
                    len(places),
                    settings.grader,
                    counts_of(unmatched[gold] for gold, _ in places if gold in unmatched),
                    ", ".join(list(golds)[:3]),
                )
    return found


def _answer(
    parts: Sequence[Sequence[Part]],
    config: Config,
    model_folder: Path,
    shape: ModelShape,
    tokenizer: Any,
    sampling: Sampling,
) -> None:
    """Answer the parts that have no file yet. The model is always loaded: its hash must match that of existing answers."""
    everything = [part for own in parts for part in own]
    done = [part for part in everything if part.path.exists()]
    for own in parts:
        own[0].path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(own[0].path.parent)
    opened = _open_model(config, model_folder, shape, tokenizer, num_steps=len(everything), first_step=len(done))
    with opened as (client, fingerprint):
        grader = {"grader": config.verify.grader, "rules": rules_of(config.verify.grader)}
        common = {"weights": fingerprint, **grader, "seed": config.seed, **asdict(sampling)}
        common = json.loads(json.dumps(common))  # as it will be read back
        settings = {
            own[0].task.benchmark.name: common
            | {"questions": questions_hash(own[0].task.prompts), "samples": own[0].task.samples}
            for own in parts
        }
        for part in done:
            check_part(part, settings[part.task.benchmark.name])
        for number, part in enumerate((part for part in everything if part not in done), start=len(done) + 1):
            result = answer_part(part, client, sampling, settings[part.task.benchmark.name])
            client.progress.step_done({"step": number, "eval_accuracy": result.accuracy})


@contextlib.contextmanager
def _open_model(
    config: Config, model_folder: Path, shape: ModelShape, tokenizer: Any, *, num_steps: int, first_step: int = 0
) -> Iterator[tuple[RolloutClient, str]]:
    """A client with the weights of ``model_folder`` loaded, and their fingerprint."""
    table = weight_table(shape)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(HFReader(model_folder, "MODEL"))
        for note in reader.check(table):
            log.warning("%s: %s", model_folder, note)
        progress = stack.enter_context(open_progress(num_steps, first_step))
        client = open_rollout_client(
            _apart(config, model_folder, shape), model_folder, shape, tokenizer, stack, PhaseTimer(), progress
        )
        whole = ((name, reader.read(name, 0, 0, shape[0])) for name, shape in table.shapes.items())
        tensors = ((name, refuse_non_finite("MODEL", model_folder, name, tensor)) for name, tensor in whole)
        yield client, client.engine.load(tensors, version=0)


def _apart(config: Config, model_folder: Path, shape: ModelShape) -> Config:
    """``config`` with its own run folder, so that servers of an evaluation and of training stay apart, and with servers that
    accept whatever fits the model's context."""
    longest = max(shape.max_positions - config.data.max_prompt_tokens, config.rollout.max_answer_tokens)
    update = {
        "run_dir": config.run_dir / "evaluate",
        "model": config.model.model_copy(update={"path": model_folder}),
        "rollout": config.rollout.model_copy(update={"max_answer_tokens": longest, "max_staleness": 0}),
    }
    return config.model_copy(update=update)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
