"""Collecting ahead of training, evaluating alongside it, and the log-prob probe between engine and trainer."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from greedy import greedy_accuracy
from waiting import until

from nft_megatron.base.errors import StoppedEarly
from nft_megatron.base.records import Request, Sampling
from nft_megatron.collect.async_collector import AsyncCollector
from nft_megatron.collect.collector import CollectorState, Dataset
from nft_megatron.config.sections import RolloutConfig
from nft_megatron.data.ledger import read_groups, read_index
from nft_megatron.observe.metrics import PhaseTimer
from nft_megatron.observe.progress import Progress
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.rollout.exclusive import ExclusiveEngine


def ledgers(run: Path) -> list[Path]:
    return sorted((run / "ledger").glob("step_*.parquet"))


@pytest.mark.parametrize(("staleness", "num_steps"), [(1, 6), (2, 5)])
def test_collecting_ahead_trains_on_answers_within_the_bound(run_config, command, metrics_of, tmp_path, staleness, num_steps):
    config = run_config(
        rollout={"max_staleness": staleness, "questions_per_step": 2},
        train={"num_steps": num_steps},
        evaluate={"every": 2},
        checkpoint={"every": 2, "export_every": 2, "keep": 9},
    )
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, num_steps + 1))
    for row, path in zip(rows, ledgers(tmp_path / "run"), strict=True):
        index = read_index(path)
        versions = index.weight_version[index.fate == "train"]
        assert row["staleness_max"] == row["step"] - 1 - versions.min() <= staleness
    assert max(row["staleness_max"] for row in rows) >= 1
    asked = [group.group_id for path in ledgers(tmp_path / "run") for group, fate in read_groups(path) if fate == "train"]
    assert len(set(asked)) == len(asked) == 2 * num_steps, "no group is trained twice"
    evaluated = {row["step"]: row.get("eval_step", row["step"]) for row in rows if "eval_accuracy" in row}
    assert evaluated == ({3: 2, 5: 4, 6: 6} if num_steps == 6 else {3: 2, 4: 4, 5: 5})
    accuracy = {row.get("eval_step", row["step"]): row["eval_accuracy"] for row in rows if "eval_accuracy" in row}
    for step, measured in accuracy.items():
        assert measured == pytest.approx(greedy_accuracy(tmp_path / "run" / "hf" / f"step_{step:06d}"))


def test_a_killed_run_collecting_ahead_loses_and_doubles_nothing(run_config, command, start, metrics_of, tmp_path):
    config, run = run_config(rollout={"max_staleness": 1}, train={"num_steps": 8}), tmp_path / "run"
    for after in (2, 4):
        process = start("train", config)
        until(lambda after=after: len(ledgers(run)) >= after, process=process)
        process.signal(9)
        process.wait()
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(run)] == list(range(1, 9))
    trained = [group.group_id for path in ledgers(run) for group, fate in read_groups(path) if fate == "train"]
    assert len(trained) == len(set(trained)) == 8 * 4
    assert all(row["staleness_max"] <= 1 for row in metrics_of(run))


def test_a_run_collecting_ahead_stops_with_everything_saved(run_config, start, command, metrics_of, tmp_path):
    config, run = (
        run_config(rollout={"max_staleness": 1}, train={"num_steps": 1_000_000}, checkpoint={"every": 1000}),
        tmp_path / "run",
    )
    process = start("train", config)
    until(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) >= 2, process=process)
    (run / "stop").touch()
    outcome = process.wait()
    assert outcome.returncode == 75, outcome.stderr
    steps = metrics_of(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step_{steps:06d}"
    assert command("train", config, f"train.num_steps={steps + 1}").returncode == 0
    assert [row["step"] for row in metrics_of(run)] == list(range(1, steps + 2))


@dataclass(frozen=True)
class FakeAsker:
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class FakeCollector:
    """Records, for each step, the version that the engine held when its collection began."""

    settings: RolloutConfig
    began: list
    version: list
    client: FakeAsker = FakeAsker()
    interrupted: object = None
    fails_at: int = 0

    def collect(self, step: int, state: CollectorState) -> tuple[Dataset, CollectorState]:
        if step == self.fails_at:
            raise ConnectionError("the network is away")
        self.began.append((step, self.version[0]))
        return Dataset(Path(f"{step}"), {}, 0), CollectorState(cursor=state.cursor + 1)

    def finish(self) -> None:
        pass


def ahead(staleness: int, last_step: int, version: int = 0, fails_at: int = 0):
    began, versions = [], [version]
    collector = FakeCollector(RolloutConfig(max_staleness=staleness), began, versions, fails_at=fails_at)
    return AsyncCollector(collector, CollectorState(), version=version, last_step=last_step), began, versions


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_collection_never_starts_before_the_weights_are_recent_enough(staleness):
    """Step k needs version k − 1 − s. A step that may begin does so without being requested."""
    collecting, began, versions = ahead(staleness, last_step=9)
    for step in range(1, 10):
        until(lambda step=step: len(began) >= min(step + staleness, 9))
        until(lambda: collecting._changed._waiters or collecting._work.done())  # it starts nothing more
        assert [each for each, _ in began] == list(range(1, min(step + staleness, 9) + 1))
        dataset, state = collecting.take(step, 120.0, lambda: None)
        assert (dataset.ledger, state.cursor) == (Path(f"{step}"), step)
        versions[0] = step
        collecting.published(step)
    assert all(step - 1 - version <= staleness for step, version in began)
    collecting.close()


def test_what_ends_the_collection_ends_the_run():
    collecting, _, _ = ahead(1, last_step=5, fails_at=2)
    assert collecting.take(1, 120.0, lambda: None)[0].ledger == Path("1")
    with pytest.raises(ConnectionError, match="the network is away"):
        collecting.take(2, 120.0, lambda: None)


def test_waiting_for_a_step_has_a_deadline_and_obeys_a_stop_request():
    collecting, _, _ = ahead(1, last_step=5)
    with pytest.raises(TimeoutError, match="step 3 was not collected within 0 s"):
        collecting.take(3, 0.1, lambda: None)
    with pytest.raises(StoppedEarly, match="while collecting step 3 by a test"):
        collecting.take(3, 120.0, lambda: "a test")
    collecting.close()
    assert collecting._work.done()


class SlowEngine:
    """Takes its time and fails if two calls overlap. While ``may_end`` is clear, no call ends."""

    overlaps = False

    def __init__(self) -> None:
        self.busy, self.log, self.may_end = threading.Lock(), [], threading.Event()
        self.may_end.set()

    def _alone(self, what: str):
        assert self.busy.acquire(blocking=False), f"{what} while busy"
        self.log.append(what)
        assert self.may_end.wait(120)
        time.sleep(0.002)
        self.busy.release()

    def load(self, tensors, version):
        self._alone(f"load {version}")
        return "fingerprint"

    def generate(self, requests, sampling, given_up=frozenset()):
        for request in requests:
            self._alone(f"answer {request.request_id}")
            yield request.request_id

    def close(self):
        pass


def test_threads_take_turns_with_an_engine_and_new_weights_go_first():
    slow = SlowEngine()
    engine = ExclusiveEngine(slow, deadline_seconds=120.0)

    def ask(first: int) -> None:
        requests = [Request(first + i, np.array([1]), (0,)) for i in range(4)]
        assert list(engine.generate(requests, Sampling())) == [first + i for i in range(4)]

    threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 10, 20)]
    fingerprints: list[str] = []
    threads.append(threading.Thread(target=lambda: fingerprints.append(engine.load([], 7))))
    slow.may_end.clear()
    for thread in threads:
        thread.start()
        until(lambda: slow.log)
    until(lambda: engine._num_loads_waiting)
    slow.may_end.set()
    for thread in threads:
        thread.join(120)
    assert fingerprints == ["fingerprint"]
    assert slow.log[4] == "load 7", "it must wait only for the answers in progress"
    calls = [line for line in slow.log if line != "load 7"]
    assert [calls[i : i + 4] for i in (0, 4, 8)] == [[f"answer {first + i}" for i in range(4)] for first in (0, 10, 20)] or [
        calls[i : i + 4] for i in (0, 4, 8)
    ] == [[f"answer {first + i}" for i in range(4)] for first in (0, 20, 10)]


def test_a_turn_that_does_not_come_is_a_fault():
    engine = ExclusiveEngine(SlowEngine(), deadline_seconds=0.05)
    under_way = engine.generate([Request(0, np.array([1]), (0,)), Request(1, np.array([1]), (0,))], Sampling())
    next(under_way)
    with pytest.raises(EngineFault, match="busy with other answers for 0 s"):
        engine.load([], 1)
    under_way.close()
    assert engine.load([], 1) == "fingerprint"


def test_the_probe_compares_engine_and_trainer_after_every_sync(run_config, command, metrics_of, tmp_path):
    config = run_config(rollout={"probe_questions": 5, "probe_tokens": 2}, train={"num_steps": 2})
    assert command("train", config).returncode == 0
    rows = metrics_of(tmp_path / "run")
    assert all(0 < row["gate_mean"] <= row["gate_max"] < 1e-5 for row in rows)
    answers = [answer for group, _ in read_groups(tmp_path / "run" / "ledger" / "gate.parquet") for answer in group.answers]
    assert len(answers) == 5
    assert all(answer.completion.weight_version == 2 and len(answer.completion.tokens) <= 2 for answer in answers)


@pytest.mark.parametrize("gate", [0, 4])
def test_an_engine_unlike_the_trainer_is_rejected_before_the_first_update(run_config, command, tmp_path, gate):
    """Float32 noise exceeds a limit of 1e-12: the probe finds it, or else the step's own answers show it."""
    refused = command("train", run_config(rollout={"probe_questions": gate, "max_mismatch": 1e-12}))
    assert refused.returncode == 2
    what = "the probe's answers of version 0" if gate else "the answers of step 1"
    assert f"rollout.max_mismatch = 1e-12: in {what} the log-probs of engine and trainer differ by" in refused.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()
