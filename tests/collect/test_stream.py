"""Collecting in a stream: against an engine that ends answers in any order, and in whole runs with the embedded engine."""

import heapq
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from waiting import until

from nft_megatron.base.errors import StoppedEarly, UserError
from nft_megatron.base.records import Completion, Prompt, Sampling
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.collect.admission import Admission
from nft_megatron.collect.collector import CollectorState
from nft_megatron.collect.generate_and_grade import RolloutClient, answer_seed
from nft_megatron.collect.stream import StreamCollector
from nft_megatron.config.load import load_config
from nft_megatron.config.sections import RolloutConfig
from nft_megatron.data.ledger import read_groups, read_index, read_meta
from nft_megatron.data.prompts import PromptOrder
from nft_megatron.observe.metrics import METRICS
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.verify.reasons import verdict

GROUP_SIZE, QUOTA, LAST_STEP = 4, 3, 8


def expected(seed):
    """Length of the answer with this seed and whether it is right. Of seven questions two have answers of one kind."""
    rng = np.random.default_rng(seed)
    return int(min(rng.lognormal(2, 1), 200)) + 1, bool(rng.random() < 0.5)


class Engine:
    """Every answer in progress grows by a token at a time; a call of ``next`` in ``fails_at`` is a power cut."""

    overlaps = True

    def __init__(self, version=0):
        self.version, self.now, self.calls, self.fails_at, self.aborts = version, 0, 0, -1, False
        self.progress, self.most, self.asked, self.is_closed = [], 0, [], False

    def load(self, tensors, version): ...
    def generate(self, requests, sampling, given_up=frozenset()): ...
    def close(self): ...

    def open_stream(self, sampling):
        return Stream(self)


class Stream:
    def __init__(self, engine):
        self.engine = engine

    @property
    def version(self):
        return self.engine.version

    def ask(self, requests):
        for request in requests:
            self.engine.asked.append(request.request_id)
            for index, seed in enumerate(request.seeds):
                length, is_right = expected(seed)
                item = (self.engine.now + length, request.request_id, index, length, is_right, self.version)
                heapq.heappush(self.engine.progress, item)
        self.engine.most = max(self.engine.most, len(self.engine.progress))

    def next(self, timeout):
        engine = self.engine
        engine.calls += 1
        if engine.calls == engine.fails_at:
            raise ConnectionError("the power went out")
        if not engine.progress:
            return None
        engine.now, request_id, index, length, is_right, version = heapq.heappop(engine.progress)
        tokens = np.full(length, is_right, dtype=np.int32)
        reason = "abort" if engine.aborts else "stop"
        return Completion(request_id, index, tokens, np.zeros(length, dtype=np.float32), reason, version, 0.0)

    def close(self):
        self.engine.is_closed = True


class Judge:
    def submit(self, text, gold, finish_reason, question=""):
        judged = Future()
        judged.set_result(replace(verdict("exact", "test/1"), label="correct" if text == "1" else "wrong"))
        return judged


def build(folder: Path, engine=None, *, staleness=1, order="closed", num_answers=24, **changes) -> StreamCollector:
    folder.mkdir(exist_ok=True)
    (folder / "lock").touch()  # as if the run were open
    run_folder = RunFolder(folder)
    for each in run_folder.folders:
        each.mkdir(exist_ok=True)
    settings = RolloutConfig(
        questions_per_step=QUOTA,
        group_size=GROUP_SIZE,
        max_staleness=staleness,
        stream=True,
        stream_order=order,
        stream_answers=num_answers,
    ).model_copy(update=changes)
    prompts = [Prompt(f"q/{i}", f"question {i}", "1", np.array([i + 1], dtype=np.int32)) for i in range(17)]
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: str(tokens[0]))
    client = RolloutClient(engine or Engine(), Judge(), tokenizer, seed=0, deadline_seconds=60.0)
    return StreamCollector(
        run_folder,
        PromptOrder(prompts, seed=0),
        client,
        Sampling(max_tokens=256),
        settings,
        admission=Admission.of(settings, LAST_STEP, filters_prompts=True),
    )


def is_mixed(position):
    return 0 < sum(expected(answer_seed(0, "train", position, index))[1] for index in range(GROUP_SIZE)) < GROUP_SIZE


def trained(folder, last_step=10**6):
    """Positions in the order of training, of the ledgers up to ``last_step``."""
    paths = [RunFolder(folder).ledger(step) for step in RunFolder(folder).ledger_steps() if step <= last_step]
    return [group.group_id for path in paths for group, fate in read_groups(path) if fate == "train"]


def check_content(folder):
    """All answers are those of their seeds, and none is too old."""
    for path in (folder / "ledger").glob("step_*.parquet"):
        index = read_index(path)
        step = read_meta(path)["step"]
        assert step - 1 - index.weight_version[index.fate == "train"].min() <= 1
        assert read_meta(path)["metrics"]["answers_too_old"] == 0
        for group, _ in read_groups(path):
            for answer in group.answers:
                length, is_right = expected(answer_seed(0, "train", group.group_id, answer.completion.index))
                assert len(answer.completion.tokens) == length
                assert (answer.verdict.label == "correct") == is_right


def check_complete(folder, step, state):
    """After ``step`` each question before the cursor is trained, waits, is in flight, or has answers of one kind."""
    fates = [*trained(folder, step), *(group.group_id for group in state.surplus), *state.in_flight]
    assert len(set(fates)) == len(fates)
    assert set(fates) | {i for i in range(state.cursor) if not is_mixed(i)} == set(range(state.cursor))


@pytest.mark.parametrize("order", ["closed", "question"])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_stream_trains_every_mixed_group_once_and_in_time(tmp_path, order, lag):
    engine = Engine()
    collector, state = build(tmp_path / "run", engine, order=order), CollectorState()
    for step in range(1, LAST_STEP + 1):
        engine.version = max(step - 1 - lag, 0)
        dataset, state = collector.collect(step, state)
        assert dataset.metrics["groups_trained"] >= QUOTA and dataset.metrics["groups_in_flight"] == len(state.in_flight)
        assert dataset.metrics["staleness_max"] <= 1 and dataset.metrics.keys() <= METRICS.keys()
        check_complete(tmp_path / "run", step, state)
    check_content(tmp_path / "run")
    assert engine.asked == list(range(state.cursor)), "each question once, in their order"
    assert 12 <= engine.most <= 24
    if order == "question":
        assert trained(tmp_path / "run") == sorted(trained(tmp_path / "run"))
    assert len(state.in_flight) + len(state.surplus) <= 2 * QUOTA, "hardly anything is left over at the end"
    assert not collector.folder.rounds(LAST_STEP)
    collector.finish()
    assert engine.is_closed


@pytest.mark.parametrize("save_seconds", [1e-9, 1e9])
@pytest.mark.parametrize("seed", range(5))
def test_kills_at_any_moment_lose_and_double_nothing(tmp_path, seed, save_seconds):
    """A killed run begins again from the newest state, or from that of a checkpoint some steps before."""
    folder, rng = tmp_path / "run", np.random.default_rng(seed)
    engine, states, step = Engine(), {0: CollectorState()}, 1
    collector, num_kills, asked = build(folder, engine, save_seconds=save_seconds), 0, []
    engine.fails_at = int(rng.integers(1, 30))
    while step <= LAST_STEP:
        engine.version = int(rng.integers(max(step - 2, engine.version), step))
        try:
            _, states[step] = collector.collect(step, states[step - 1])
            check_complete(folder, step, states[step])
            step += 1
        except ConnectionError:
            num_kills += 1
            asked += engine.asked
            step = max(step - int(rng.integers(3)), 1)  # the weights are those of a checkpoint
            engine = Engine(version=step - 1)
            engine.fails_at = int(rng.integers(1, 30)) if num_kills < 20 else -1
            states[step - 1].save(tmp_path / "state.parquet")
            states[step - 1] = CollectorState.load(tmp_path / "state.parquet")
            collector = build(folder, engine, save_seconds=save_seconds)
    assert num_kills > 2
    check_content(folder)
    check_complete(folder, LAST_STEP, states[LAST_STEP])
    assert set(asked + engine.asked) == set(range(states[LAST_STEP].cursor))


def test_a_stop_request_saves_what_has_closed(tmp_path):
    engine = Engine()
    collector = build(tmp_path / "run", engine)
    stopping = replace(collector, interrupted=lambda: "a test" if engine.calls > 16 else None)
    with pytest.raises(StoppedEarly, match="stopped while collecting step 1 by a test; finished groups are saved"):
        stopping.collect(1, CollectorState())
    saved = {group.group_id for part in collector.folder.round_parts(1, 0) for group, _ in read_groups(part)}
    assert saved
    again = Engine()
    _, state = build(tmp_path / "run", again).collect(1, CollectorState())
    assert saved.isdisjoint(again.asked) and set(range(state.cursor)) == saved | set(again.asked)
    check_complete(tmp_path / "run", 1, state)


def test_questions_in_flight_are_asked_again_before_new_ones(tmp_path):
    engine = Engine()
    _, state = build(tmp_path / "run", engine).collect(1, CollectorState())
    assert state.in_flight
    again = Engine(version=1)
    build(tmp_path / "run", again).collect(2, state)
    assert again.asked[: len(state.in_flight)] == list(state.in_flight)
    assert set(again.asked[len(state.in_flight) :]).isdisjoint(range(state.cursor))


def test_without_mixed_groups_a_stream_ends_as_rounds_do(tmp_path, caplog):
    collector = build(tmp_path / "run", max_rounds=2, oversample=2.0)
    collector.client.tokenizer.decode = lambda tokens, skip_special_tokens: "0"
    with pytest.raises(UserError, match=r"rollout\.max_rounds = 2: none of 12 questions had both right and wrong answers"):
        collector.collect(1, CollectorState())


def test_an_engine_that_cuts_off_answers_is_a_fault(tmp_path):
    engine = Engine()
    engine.aborts = True
    with pytest.raises(EngineFault, match="cut off most answers to 8 questions in a row"):
        build(tmp_path / "run", engine).collect(1, CollectorState())


def ledgers(run: Path) -> list[Path]:
    return sorted((run / "ledger").glob("step_*.parquet"))


@pytest.mark.parametrize(("staleness", "order"), [(1, "closed"), (2, "question")])
def test_a_run_in_a_stream_trains_within_the_bound(run_config, command, metrics_of, tmp_path, staleness, order):
    choice = {"max_staleness": staleness, "stream": True, "stream_order": order, "stream_answers": 32}
    done = command("train", run_config(rollout=choice, train={"num_steps": 5}))
    assert done.returncode == 0, done.stderr
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row, path in zip(rows, ledgers(tmp_path / "run"), strict=True):
        index = read_index(path)
        versions = index.weight_version[index.fate == "train"]
        assert row["staleness_max"] == row["step"] - 1 - versions.min() <= staleness
        assert row["answers_too_old"] == 0 and row["groups_trained"] >= 4
    positions = trained(tmp_path / "run")
    assert len(set(positions)) == len(positions) == sum(row["groups_trained"] for row in rows)


def test_a_killed_run_in_a_stream_loses_and_doubles_nothing(run_config, command, start, metrics_of, tmp_path):
    choice = {"max_staleness": 1, "stream": True, "stream_answers": 24, "save_seconds": 0.01}
    config, run = run_config(rollout=choice, train={"num_steps": 8}), tmp_path / "run"
    for after in (2, 4):
        process = start("train", config)
        until(lambda after=after: len(ledgers(run)) >= after, process=process)
        process.signal(9)
        process.wait()
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(run)] == list(range(1, 9))
    assert len(trained(run)) == len(set(trained(run))) == sum(row["groups_trained"] for row in metrics_of(run)) >= 8 * 4
    assert all(row["staleness_max"] <= 1 and row["answers_too_old"] == 0 for row in metrics_of(run))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"stream": True}}, "rollout.stream = True: needs answers that may be older"),
        (
            {"rollout": {"stream": True, "max_staleness": 1, "give_up_after": 3}},
            "rollout.give_up_after = 3: ends a round early",
        ),
        (
            {"rollout": {"stream": True, "max_staleness": 1, "stop_at_quota": True}},
            "rollout.stop_at_quota = True: ends a round",
        ),
        (
            {"rollout": {"stream": True, "max_staleness": 1, "engine": "vllm"}, "fleet": {"servers": 1}},
            "fleet.in_flight = finish: lets all answers end before new weights",
        ),
    ],
)
def test_what_a_stream_cannot_have_is_refused(run_config, sections, message):
    with pytest.raises(UserError, match=message):
        load_config(run_config(**sections))
