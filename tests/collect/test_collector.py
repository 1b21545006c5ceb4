"""Collection with the real engine and verifier; a wrapper around the engine counts, and fails on demand."""

import contextlib
import re
import shutil
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from nft_megatron.base.errors import StoppedEarly, UserError
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.collect import collector as collecting
from nft_megatron.collect import generate_and_grade as ask
from nft_megatron.collect import rounds
from nft_megatron.collect.build import open_rollout_client, read_prompts, training_sampling
from nft_megatron.collect.collector import Collector, CollectorState
from nft_megatron.collect.generate_and_grade import RolloutClient
from nft_megatron.config.load import load_config
from nft_megatron.data.ledger import read_groups, read_index, read_meta, write_ledger
from nft_megatron.data.prompts import PromptOrder
from nft_megatron.data.tokenizer import load_tokenizer
from nft_megatron.observe.metrics import METRICS, PhaseTimer
from nft_megatron.observe.progress import Progress
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.verify.reasons import REASONS, verdict
from nft_megatron.weights import read_shape, weight_table
from nft_megatron.weights.hf_reader import HFReader


class Counting:
    """The engine, the ids requested of it, and an optional failure in round ``fails_in`` (from 0).

    ``version`` is the weight version of its answers.
    """

    def __init__(self, engine, fails_in=None) -> None:
        self.engine, self.fails_in, self.rounds, self.aborts, self.version = engine, fails_in, [], False, 0

    def generate(self, requests, sampling, given_up=frozenset()):
        self.rounds.append([request.request_id for request in requests])
        for number, completion in enumerate(self.engine.generate(requests, sampling, given_up)):
            if len(self.rounds) - 1 == self.fails_in and number == 3:
                raise ConnectionError("the power went out")
            version = self.version(completion) if callable(self.version) else self.version
            completion = replace(completion, weight_version=version)
            yield replace(completion, finish_reason="abort") if self.aborts else completion


class AllWrong:
    """A verifier that finds no box anywhere."""

    def submit(self, text, gold, finish_reason, question=""):
        judged = Future()
        judged.set_result(verdict("no closed box", "strict/1"))
        return judged


@pytest.fixture
def collector(run_config, model_folder):
    """Builds a collector with its own run folder; all share one engine."""
    with contextlib.ExitStack() as stack:
        config = load_config(run_config())
        tokenizer = load_tokenizer(model_folder)
        client = open_rollout_client(config, model_folder, read_shape(model_folder), tokenizer, stack, PhaseTimer(), Progress())
        with HFReader(model_folder) as reader:
            shapes = weight_table(read_shape(model_folder)).shapes
            client.engine.load(((name, reader.read(name, 0, 0, shape[0])) for name, shape in shapes.items()), version=0)
        order = PromptOrder(read_prompts(config, tokenizer, "data.train").prompts, seed=0)

        def build(folder, fails_in=None, **settings) -> Collector:
            folder.mkdir(exist_ok=True)
            (folder / "lock").touch()  # as if the run were open
            return Collector(
                RunFolder(folder),
                order,
                replace(client, engine=Counting(client.engine, fails_in)),
                training_sampling(config, model_folder, tokenizer),
                config.rollout.model_copy(update={"oversample": 1.0, **settings}),
            )

        yield build


def content(path):
    return [
        (g.group_id, g.prompt.question_id, fate, [(a.completion.tokens.tolist(), a.text, a.verdict.label) for a in g.answers])
        for g, fate in read_groups(path)
    ]


def test_ledger_holds_the_first_mixed_groups_and_the_right_statistics(collector, tmp_path):
    built = collector(tmp_path / "run")
    collected, state = built.collect(1, CollectorState())
    index = read_index(collected.ledger)
    asked = [position for asked_round in built.client.engine.rounds for position in asked_round]
    assert asked == list(range(state.cursor)) == list(range(collected.metrics["groups_sampled"]))
    groups = np.unique(index.group_id)
    assert len(groups) == 4 == collected.metrics["groups_trained"]
    for group in groups:
        member = index.group_id == group
        assert member.sum() == 8
        assert index.correct_rate[member].tolist() == [index.is_correct[member].mean()] * 8
        assert 0 < index.correct_rate[member][0] < 1
    for group, _ in read_groups(collected.ledger):
        gold = group.prompt.gold
        for answer in group.answers:
            right = answer.completion.finish_reason == "stop" and answer.text.endswith(f"\\boxed{{{gold}}}")
            assert (answer.verdict.label == "correct") == right, answer
    assert collected.metrics["rounds"] == len(built.client.engine.rounds)
    assert state.mixed_rate == pytest.approx(collected.metrics["groups_mixed"] / len(asked))


@dataclass
class Recording:
    """The client and all prompts with their answers."""

    client: RolloutClient
    asked: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.client, name)

    def stream(self, prompts, *arguments, **named):
        for prompt_id, answers in self.client.stream(prompts, *arguments, **named):
            self.asked.append((prompts[prompt_id], answers))
            yield prompt_id, answers


def test_the_reasons_for_verdicts_are_in_the_metrics(collector, tmp_path):
    """Counted from the texts by the rules of this tiny task: an answer ends with a box, with <eos> or at the limit."""
    built = collector(tmp_path / "run")
    recording = Recording(built.client)
    metrics = replace(built, client=recording).collect(1, CollectorState())[0].metrics
    expected = Counter()
    for prompt, answers in recording.asked:
        for answer in answers:
            box = re.search(r"\\boxed\{(.)\}", answer.text)
            decided = "no closed box" if box is None else "exact" if box[1] == prompt.gold else "another number"
            expected["truncated" if answer.completion.finish_reason == "length" else decided] += 1
    assert len(expected) == 4, "all four ways occur"
    shares = {f"verdict/{reason}": count / expected.total() for reason, count in expected.items()}
    assert {name: value for name, value in metrics.items() if name.startswith("verdict/")} == pytest.approx(shares)
    assert shares.keys() <= METRICS.keys()
    assert metrics["verdict/truncated"] == pytest.approx(metrics["truncated_rate"])


def test_finished_rounds_survive_a_failure_and_are_not_repeated(collector, tmp_path):
    settings = {"questions_per_step": 12}  # each round asks for what is still missing
    whole, _ = collector(tmp_path / "whole", **settings).collect(1, CollectorState())
    assert whole.metrics["rounds"] >= 3
    broken = collector(tmp_path / "broken", fails_in=2, **settings)
    with pytest.raises(ConnectionError):
        broken.collect(1, CollectorState())
    assert not RunFolder(tmp_path / "broken").ledger(1).exists()
    resumed = collector(tmp_path / "broken", **settings)
    collected, _ = resumed.collect(1, CollectorState())
    assert resumed.client.engine.rounds[0] == broken.client.engine.rounds[2]
    assert len(resumed.client.engine.rounds) == whole.metrics["rounds"] - 2
    assert content(collected.ledger) == content(whole.ledger)
    assert collected.metrics == whole.metrics
    assert not RunFolder(tmp_path / "broken").rounds(1)
    again = collector(tmp_path / "broken", **settings)
    assert again.collect(1, CollectorState())[0].metrics == whole.metrics
    assert again.client.engine.rounds == []


def test_surplus_is_kept_while_its_staleness_is_allowed(collector, tmp_path):
    built = collector(tmp_path / "run", questions_per_step=2, oversample=4.0, max_staleness=1)
    first, state = built.collect(1, CollectorState())
    surplus = state.surplus
    assert len(surplus) == first.metrics["groups_surplus"] > 2
    state.save(tmp_path / "collector.parquet")
    restored = CollectorState.load(tmp_path / "collector.parquet")
    assert (restored.cursor, restored.mixed_rate) == (state.cursor, state.mixed_rate)
    second, state = built.collect(2, restored)
    trained = [group.group_id for group, fate in read_groups(second.ledger) if fate == "train"]
    assert trained == [group.group_id for group in surplus[:2]]
    assert second.metrics["staleness_max"] == 1
    assert second.metrics["groups_sampled"] == 0
    built.client.engine.version = 2
    third, _ = built.collect(3, state)
    assert third.metrics["staleness_max"] == 0
    assert third.metrics["answers_too_old"] == 8 * len(state.surplus) > 0
    assert all(group.step == 3 for group, _ in read_groups(third.ledger))


def test_answers_older_than_allowed_are_dropped_and_counted(collector, tmp_path):
    """Half of each group's answers began on weights that are too old: r̂ covers the other half."""
    built = collector(tmp_path / "run", max_staleness=1)
    recording = Recording(built.client)
    engine = built.client.engine
    engine.version = lambda completion: 3 - completion.index % 2
    collected, _ = replace(built, client=recording).collect(5, CollectorState())
    assert collected.metrics["answers_too_old"] == sum(len(answers) for _, answers in recording.asked) / 2
    assert collected.metrics["staleness_max"] == 1
    rates = {}
    for prompt, answers in recording.asked:
        kept = [answer.verdict.label == "correct" for answer in answers[::2]]
        rates[prompt.question_id] = np.mean(kept)
    groups = [group for group, fate in read_groups(collected.ledger) if fate == "train"]
    assert len(groups) == 4
    for group in groups:
        assert len(group.answers) == 4
        assert group.correct_rate == rates[group.prompt.question_id]


@pytest.mark.parametrize(("save_seconds", "num_parts"), [(1e-9, 4), (1e9, 1)])
def test_finished_groups_of_an_unfinished_round_are_not_repeated(collector, tmp_path, monkeypatch, save_seconds, num_parts):
    monkeypatch.setattr(ask, "_LOOK_SECONDS", 1e9)  # so that the request to stop is seen only after each group
    settings = {"save_seconds": save_seconds, "oversample": 4.0}
    whole, _ = collector(tmp_path / "whole", **settings).collect(1, CollectorState())
    broken = collector(tmp_path / "broken", **settings)
    asked = iter(range(3))
    stopping = replace(broken, interrupted=lambda: None if next(asked, None) is not None else "a test")
    with pytest.raises(StoppedEarly, match="stopped while collecting step 1 by a test"):
        stopping.collect(1, CollectorState())
    parts = RunFolder(tmp_path / "broken").round_parts(1, 0)
    saved = {group.group_id for part in parts for group, _ in read_groups(part)}
    assert len(parts) == num_parts and len(saved) == 4
    resumed = collector(tmp_path / "broken", **settings)
    collected, _ = resumed.collect(1, CollectorState())
    assert resumed.client.engine.rounds[0] == [i for i in range(16) if i not in saved]
    assert content(collected.ledger) == content(whole.ledger)
    assert not RunFolder(tmp_path / "broken").rounds(1)


def test_an_answer_is_written_in_a_part_of_its_round_and_in_its_steps_ledger(collector, tmp_path, monkeypatch):
    written = Counter()

    def counting(path, groups, **named):
        written.update((group.group_id, answer.completion.index) for group in groups for answer in group.answers)
        write_ledger(path, groups, **named)

    for module in (rounds, collecting):
        monkeypatch.setattr(module, "write_ledger", counting)
    collected, state = collector(tmp_path / "run", save_seconds=1e-9, oversample=4.0).collect(1, CollectorState())
    trained = {group.group_id for group, _ in read_groups(collected.ledger)}
    times = {group_id: {n for (asked, _), n in written.items() if asked == group_id} for group_id in range(state.cursor)}
    assert times == {group_id: {2} if group_id in trained else {1} for group_id in range(state.cursor)}
    assert len(written) == 8 * state.cursor


def test_a_complete_round_in_the_single_file_of_earlier_versions_is_not_repeated(collector, tmp_path):
    settings = {"questions_per_step": 12}
    whole, _ = collector(tmp_path / "whole", **settings).collect(1, CollectorState())
    broken = collector(tmp_path / "broken", fails_in=1, **settings)
    with pytest.raises(ConnectionError):
        broken.collect(1, CollectorState())
    (part,) = RunFolder(tmp_path / "broken").rounds(1)
    groups = [group for group, _ in read_groups(part)]
    part.with_name("step_000001_round_00.parquet").write_bytes(part.read_bytes())
    write_ledger(part, groups[:5], fates=["sampled"] * 5, meta={})  # a kill prevented its deletion
    resumed = collector(tmp_path / "broken", **settings)
    collected, _ = resumed.collect(1, CollectorState())
    assert resumed.client.engine.rounds[0] == broken.client.engine.rounds[1]
    assert content(collected.ledger) == content(whole.ledger)
    assert collected.metrics == whole.metrics
    assert not RunFolder(tmp_path / "broken").rounds(1)


class Silent(Counting):
    """After 20 answers it is silent, as servers may be for minutes, until the rest is given up."""

    is_silent = False

    def generate(self, requests, sampling, given_up=frozenset()):
        limit = time.monotonic() + 60
        for number, completion in enumerate(super().generate(requests, sampling, given_up)):
            self.is_silent = number >= 20
            while self.is_silent and not all(request.request_id in given_up for request in requests):
                assert time.monotonic() < limit, "the request to stop was not seen"
                time.sleep(0.01)
            if self.is_silent:
                return
            yield completion


def test_a_stop_request_is_noticed_while_no_answer_arrives(collector, tmp_path):
    whole, _ = collector(tmp_path / "whole", oversample=4.0).collect(1, CollectorState())
    built = collector(tmp_path / "run", oversample=4.0)
    engine = Silent(built.client.engine)
    stopping = replace(
        built, client=replace(built.client, engine=engine), interrupted=lambda: "a test" if engine.is_silent else None
    )
    with pytest.raises(StoppedEarly, match="by a test"):
        stopping.collect(1, CollectorState())
    parts = RunFolder(tmp_path / "run").round_parts(1, 0)
    assert all(len(group.answers) == 8 for part in parts for group, _ in read_groups(part)), "finished ones alone"
    assert all(read_meta(part) == {} for part in parts), "none says that the round is whole"
    assert content(collector(tmp_path / "run", oversample=4.0).collect(1, CollectorState())[0].ledger) == content(whole.ledger)


def test_a_round_ends_at_the_quota_if_configured(collector, tmp_path):
    built = collector(tmp_path / "run", stop_at_quota=True, oversample=8.0)
    recording = Recording(built.client)
    collected, state = replace(built, client=recording).collect(1, CollectorState())
    verdicts = [[answer.verdict.label for answer in answers] for _, answers in recording.asked]
    assert len([labels for labels in verdicts if len(set(labels)) == 2]) == 4
    assert state.cursor == 32
    assert collected.metrics["groups_abandoned"] == 32 - len(verdicts) > 0
    assert collected.metrics["groups_surplus"] == 0


def test_a_question_whose_verdicts_agree_is_abandoned_if_configured(collector, tmp_path):
    plain = collector(tmp_path / "plain", oversample=4.0)
    recording = Recording(plain.client)
    replace(plain, client=recording).collect(1, CollectorState())
    saving = collector(tmp_path / "saving", oversample=4.0, give_up_after=7)
    kept = Recording(saving.client)
    collected, _ = replace(saving, client=kept).collect(1, CollectorState())
    assert len(kept.asked) == 16 - collected.metrics["groups_abandoned"] < 16
    for prompt, answers in recording.asked:
        if prompt.question_id not in {each.question_id for each, _ in kept.asked}:
            labels = [answer.verdict.label for answer in answers]
            assert max(labels.count("correct"), labels.count("wrong")) >= 7, "at most its last verdict could differ"


class Reversed:
    """The engine, with its answers in another order."""

    def __init__(self, engine) -> None:
        self.engine, self.hints = engine, []

    def generate(self, requests, sampling, given_up=frozenset()):
        self.hints.append([request.expected_tokens for request in requests])
        yield from reversed(list(self.engine.generate(requests, sampling)))


def test_the_order_in_which_answers_arrive_changes_nothing(collector, tmp_path):
    whole, _ = collector(tmp_path / "whole").collect(1, CollectorState())
    built = collector(tmp_path / "reversed")
    other = replace(built, client=replace(built.client, engine=Reversed(built.client.engine)))
    collected, _ = other.collect(1, CollectorState())
    assert content(collected.ledger) == content(whole.ledger)
    assert collected.metrics == whole.metrics


def test_lengths_of_earlier_answers_are_a_hint_to_the_engine(collector, tmp_path):
    built = collector(tmp_path / "run", oversample=4.0, questions_per_step=8)
    engine = Reversed(built.client.engine)
    recording = Recording(replace(built.client, engine=engine))
    other = replace(built, client=recording)
    _, state = other.collect(1, CollectorState())
    built.client.engine.version = 1
    last_answers = {prompt.question_id: answers for prompt, answers in recording.asked}
    num_rounds = len(engine.hints)
    other.collect(2, state)
    hints = engine.hints[num_rounds]
    asked = built.order.take(state.cursor, len(hints))
    known = [(last_answers[p.question_id], hint) for p, hint in zip(asked, hints, strict=True) if p.question_id in last_answers]
    assert known
    for answers, hint in known:
        assert abs(hint - np.mean([len(answer.completion.tokens) for answer in answers])) <= 0.5


def test_too_few_mixed_groups_train_with_a_warning(collector, tmp_path, caplog):
    collected, _ = collector(tmp_path / "run", questions_per_step=60, max_rounds=1).collect(1, CollectorState())
    assert 0 < collected.metrics["groups_trained"] < 60
    assert f"trains on {collected.metrics['groups_trained']} of 60 questions" in caplog.text


def test_an_engine_that_cuts_off_most_answers_is_a_fault_and_leaves_no_round(collector, tmp_path):
    built = collector(tmp_path / "run")
    built.client.engine.aborts = True
    with pytest.raises(EngineFault, match="cut off 32 of 32 answers"):
        built.collect(1, CollectorState())
    assert not RunFolder(tmp_path / "run").rounds(1)
    whole, _ = collector(tmp_path / "run").collect(1, CollectorState())
    assert whole.metrics["unknown_rate"] == 0


def test_changed_questions_are_rejected(collector, tmp_path):
    built = collector(tmp_path / "run")
    _, state = built.collect(1, CollectorState())
    shorter = PromptOrder(built.order.prompts[1:], seed=0)
    with pytest.raises(UserError, match="14 questions: are not the questions that this run started with"):
        replace(built, order=shorter).collect(2, state)
    with pytest.raises(UserError, match="are not the questions that this run started with"):
        replace(built, order=shorter).collect(1, CollectorState())  # its ledger exists, its checkpoint does not


def test_no_mixed_group_is_the_users_error(collector, tmp_path):
    built = replace(collector(tmp_path / "run", max_rounds=2), sampling=replace(collector(tmp_path).sampling, temperature=0.0))
    with pytest.raises(
        UserError, match=r"rollout\.max_rounds = 2: none of 8 questions had both right and wrong answers \("
    ) as caught:
        built.collect(1, CollectorState())
    told = re.search(
        r"(\d+) right, (\d+) wrong, 0 unknown; (.*?); for example 'What is \d \+ \d', gold '\d', ", str(caught.value)
    )
    assert told
    assert sum(map(int, told.group(1, 2))) == 64
    reasons = dict(reason.split(": ") for reason in told[3].split(", "))
    assert sum(map(int, reasons.values())) == 64 and set(reasons) <= set(REASONS)


def test_a_round_without_a_right_answer_says_so_at_once(collector, tmp_path, caplog):
    """With counts, a question and an answer to it; also where such groups are trained on."""
    built = replace(collector(tmp_path / "run"), filters_prompts=False)
    built = replace(built, client=replace(built.client, verifier=AllWrong()))
    built.collect(1, CollectorState())
    (warning,) = [record.getMessage() for record in caplog.records if "no right answer" in record.getMessage()]
    assert re.fullmatch(
        r"step 1, round 1: no right answer \(0 right, 32 wrong, 0 unknown; no closed box: 32; "
        r"for example 'What is \d \+ \d', gold '\d', was answered '.*'\)",
        warning,
    )


@pytest.mark.parametrize(("missing", "rate", "expected"), [(100, None, 300), (100, 0.5, 215), (100, 0.01, 300), (10, 1.0, 10)])
def test_round_size(collector, tmp_path, missing, rate, expected):
    """100 at rate 0.5: (100 + √50) / 0.5 = 214.1; never more than 3 × 100; at rate 1 no more than needed."""
    assert collector(tmp_path, oversample=3.0)._round_size(missing, rate) == expected


def rewritten(source, target, *, with_step: bool):
    """A copy of a ledger; without ``with_step`` as earlier versions wrote it, whose file did not name its step."""
    meta = {key: value for key, value in read_meta(source).items() if with_step or key != "step"}
    groups, fates = zip(*read_groups(source), strict=True)
    write_ledger(target, groups, fates=fates, meta=meta)


@pytest.mark.parametrize("with_step", [True, False])
@pytest.mark.parametrize("staleness", [0, 1])
def test_the_ledger_of_another_step_is_refused(collector, tmp_path, with_step, staleness):
    built = collector(tmp_path / "run", max_staleness=staleness)
    collected, state = built.collect(1, CollectorState())
    later = built.folder.ledger(2 + staleness)
    rewritten(collected.ledger, later, with_step=with_step)
    with pytest.raises(UserError, match=rf"^ledger = .*{later.name}: holds the answers of step 1, not of step {2 + staleness}"):
        built.collect(2 + staleness, state)
    later.rename(built.folder.ledger(1))
    assert built.collect(1, CollectorState())[1].cursor == state.cursor, "under its own name it is right"


def test_a_ledger_of_groups_from_the_step_before_is_right(collector, tmp_path):
    built = collector(tmp_path / "run", questions_per_step=2, oversample=4.0, max_staleness=1)
    _, state = built.collect(1, CollectorState())
    assert len(state.surplus) >= 2, "or nothing is shown"
    second, _ = built.collect(2, state)
    assert set(read_index(second.ledger).step.tolist()) == {1}
    assert built.collect(2, state)[0].metrics == second.metrics, "read back"


@pytest.mark.parametrize("number", [0, 1])
def test_parts_of_a_round_of_another_step_are_refused(collector, tmp_path, number):
    broken = collector(tmp_path / "run", fails_in=1, questions_per_step=12)
    with pytest.raises(ConnectionError):
        broken.collect(1, CollectorState())
    (part,) = broken.folder.rounds(1)
    part.rename(broken.folder.round_part(2, number, 0))
    with pytest.raises(UserError, match=r"^ledger = .*step_000002_round_0\d_part_0000.*: holds the answers of step 1, not"):
        collector(tmp_path / "run", questions_per_step=12).collect(2, CollectorState())


def test_a_run_folder_that_has_disappeared_is_not_recreated(collector, tmp_path):
    collect = collector(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError, match="the run folder has disappeared"):
        collect.collect(1, CollectorState())
    assert not (tmp_path / "run").exists()
