"""Ledger files: what comes back is what went in, to the bit, or an error that says what is wrong."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Answer, AnswerTokens, Completion, Group, Prompt, Verdict
from nft_megatron.data import ledger
from nft_megatron.data.ledger import open_ledger, read_groups, read_index, read_meta, write_ledger


def make_group(group_id: int, labels: str, lengths: list[int] | None = None, prompt_length: int = 3) -> Group:
    """One answer per letter of ``labels``: c(orrect), w(rong), u(nknown)."""
    rng = np.random.default_rng(group_id)
    names = {"c": "correct", "w": "wrong", "u": "unknown"}
    answers = []
    for k, letter in enumerate(labels):
        length = lengths[k] if lengths else k
        completion = Completion(
            request_id=group_id * 100,
            index=k,
            tokens=rng.integers(0, 2**31 - 1, length).astype(np.int32),
            logprobs=-rng.exponential(size=length).astype(np.float32),
            finish_reason="length" if letter == "u" else "stop",
            weight_version=7 + k,
            seconds=0.1 * k,
        )
        verdict = Verdict(names[letter], f"reason {k}", "strict/1", 1e-3 * k)
        answers.append(Answer(completion, f"answer {k} ✓\n", verdict))
    tokens = rng.integers(0, 2**31 - 1, prompt_length).astype(np.int32)
    prompt = Prompt(f"q/{group_id}", f"what is {group_id}?", str(group_id), tokens)
    return Group(group_id, 12, prompt, tuple(answers))


def assert_same_array(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    assert one.tobytes() == other.tobytes()


def assert_same_group(one: Group, other: Group) -> None:
    assert (one.group_id, one.step, len(one.answers)) == (other.group_id, other.step, len(other.answers))
    assert (one.prompt.question_id, one.prompt.question, one.prompt.gold) == (
        other.prompt.question_id,
        other.prompt.question,
        other.prompt.gold,
    )
    assert_same_array(one.prompt.tokens, other.prompt.tokens)
    for a, b in zip(one.answers, other.answers, strict=True):
        assert (a.text, a.verdict) == (b.text, b.verdict)
        assert_same_array(a.completion.tokens, b.completion.tokens)
        assert_same_array(a.completion.logprobs, b.completion.logprobs)
        for name in ("request_id", "index", "finish_reason", "weight_version", "seconds"):
            assert getattr(a.completion, name) == getattr(b.completion, name)


def read_tokens(path: Path, rows: list[int]) -> list[AnswerTokens]:
    with open_ledger(path) as opened:
        return opened.tokens(rows)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger" / "step_000012.parquet"


def test_round_trip(path: Path) -> None:
    groups = [make_group(5, "cwcw"), make_group(3, "cccc"), make_group(9, "uwcu")]
    meta = {"cursor": 42, "mixed_rate": 0.5, "metrics": {"accuracy": 0.1, "histogram": [1, 2]}}
    write_ledger(path, groups, fates=["train", "sampled", "surplus"], meta=meta)
    read = read_groups(path)
    assert [fate for _, fate in read] == ["train", "sampled", "surplus"]
    for (group, _), original in zip(read, groups, strict=True):
        assert_same_group(group, original)
    assert read_meta(path) == meta
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=5),
    prompt_length=st.integers(1, 5),
    max_rows=st.integers(1, 4),
    data=st.data(),
)
def test_round_trip_of_odd_lengths(lengths: list[list[int]], prompt_length: int, max_rows: int, data: st.DataObject) -> None:
    groups = [make_group(i, "cwcw"[: len(of)], of, prompt_length) for i, of in enumerate(lengths)]
    rows = [(group.prompt.tokens, a.completion.tokens, a.completion.logprobs) for group in groups for a in group.answers]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "_ROW_GROUP_ROWS", max_rows)
        path = Path(folder) / "step.parquet"
        write_ledger(path, groups, fates=["train"] * len(groups), meta={})
        assert pq.ParquetFile(path).num_row_groups == math.ceil(len(rows) / max_rows)
        for (group, _), original in zip(read_groups(path), groups, strict=True):
            assert_same_group(group, original)
        wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
        for row, tokens in zip(wanted, read_tokens(path, wanted), strict=True):
            for got, expected in zip(tokens, rows[row], strict=True):
                assert_same_array(got, expected)


@given(st.lists(st.floats(max_value=0, allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=20))
@settings(deadline=None, max_examples=20)
def test_every_float32_survives(logprobs: list[float]) -> None:
    values = np.array(logprobs, dtype=np.float32)
    completion = Completion(0, 0, np.zeros(len(values), dtype=np.int32), values, "stop", 0, 0.0)
    prompt = Prompt("q", "?", "1", np.array([1], dtype=np.int32))
    group = Group(0, 0, prompt, (Answer(completion, "", Verdict("wrong", "", "")),))
    with tempfile.TemporaryDirectory() as folder:
        write_ledger(Path(folder) / "a.parquet", [group], fates=["train"], meta={})
        (tokens,) = read_tokens(Path(folder) / "a.parquet", [0])
    assert tokens.behaviour_logprobs.tobytes() == values.tobytes()


def test_index(path: Path) -> None:
    groups = [make_group(5, "cwcu"), make_group(3, "uu"), make_group(9, "w")]
    write_ledger(path, groups, fates=["train", "surplus", "surplus"], meta={})
    index = read_index(path)
    assert index.row.tolist() == list(range(7))
    assert index.step.tolist() == [12] * 7
    assert index.group_id.tolist() == [5, 5, 5, 5, 3, 3, 9]
    assert index.question_id.tolist() == ["q/5"] * 4 + ["q/3"] * 2 + ["q/9"]
    assert index.fate.tolist() == ["train"] * 4 + ["surplus"] * 3
    assert index.label.tolist() == ["correct", "wrong", "correct", "unknown", "unknown", "unknown", "wrong"]
    assert index.is_correct.tolist() == [True, False, True, False, False, False, False]
    assert index.num_judged.tolist() == [3, 3, 3, 3, 0, 0, 1]
    np.testing.assert_array_equal(index.correct_rate, [2 / 3] * 4 + [math.nan] * 2 + [0.0])
    assert index.prompt_length.tolist() == [3] * 7
    assert index.answer_length.tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert index.weight_version.tolist() == [7, 8, 9, 10, 7, 8, 7]
    assert index.finish_reason.tolist() == ["stop", "stop", "stop", "length", "length", "length", "stop"]


def test_no_groups_at_all(path: Path) -> None:
    write_ledger(path, [], fates=[], meta={"cursor": 3})
    assert read_groups(path) == []
    assert read_index(path).row.size == read_index(path).is_correct.size == 0
    assert read_tokens(path, []) == []
    assert read_meta(path) == {"cursor": 3}


@pytest.mark.parametrize(("limit", "expected"), [(5_000, 16), (400, 16), (300, 32), (8_000, 1)])
def test_row_groups_have_equally_many_tokens_and_share_out_evenly(
    path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    """Fewer rows than a row group may have."""
    monkeypatch.setattr(ledger, "_ROW_GROUP_TOKENS", limit)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 41, (62, 4))
    write_ledger(
        path, [make_group(i, "cwcw", of) for i, of in enumerate(lengths.tolist())], fates=["train"] * len(lengths), meta={}
    )
    tokens = lengths.ravel() + 3
    assert 300 * 16 < 5_000 < tokens.sum() < 400 * 16 < 8_000
    with open_ledger(path) as opened:
        readers = [opened.share_out(np.arange(tokens.size), number) for number in (2, 16)]
    metadata = pq.ParquetFile(path).metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert len(sizes) == expected
    share = tokens.sum() / expected
    assert all(abs(part.sum() - share) <= tokens.max() for part in np.split(tokens, np.cumsum(sizes)[:-1]))
    row_group = np.repeat(np.arange(expected), sizes)
    for reader, number in zip(readers, (2, 16), strict=True) if expected > 1 else ():
        assert np.bincount(reader[np.unique(row_group, return_index=True)[1]]).tolist() == [expected // number] * number


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, math.nan], [-math.inf, -1.0]])
def test_faulty_logprobs_are_refused(path: Path, logprobs: list[float]) -> None:
    completion = Completion(0, 0, np.zeros(2, dtype=np.int32), np.array(logprobs, dtype=np.float32), "stop", 0, 0.0)
    prompt = Prompt("q/1", "?", "1", np.array([1], dtype=np.int32))
    group = Group(0, 0, prompt, (Answer(completion, "", Verdict("wrong", "", "")),))
    with pytest.raises(ValueError, match="answer 0 to question 'q/1'"):
        write_ledger(path, [group], fates=["train"], meta={})
    assert not path.exists()


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=4), min_size=1, max_size=8),
    max_rows=st.integers(1, 4),
    num_readers=st.integers(1, 5),
    data=st.data(),
)
def test_readers_share_whole_row_groups_evenly(
    lengths: list[list[int]], max_rows: int, num_readers: int, data: st.DataObject
) -> None:
    groups = [make_group(i, "cwcw"[: len(of)], of) for i, of in enumerate(lengths)]
    num_rows = sum(map(len, lengths))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "_ROW_GROUP_ROWS", max_rows)
        path = Path(folder) / "step.parquet"
        write_ledger(path, groups, fates=["train"] * len(groups), meta={})
        rows = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), unique=True, max_size=num_rows)), dtype=np.int64)
        with open_ledger(path) as opened:
            reader = opened.share_out(rows, num_readers)
        metadata = pq.ParquetFile(path).metadata
    row_group = rows // max_rows
    loads = np.zeros(num_readers)
    sizes = []
    for number in np.unique(row_group):
        (of_group,) = set(reader[row_group == number].tolist())
        columns = [metadata.row_group(int(number)).column(i) for i in range(metadata.num_columns)]
        names = ("prompt_tokens", "answer_tokens", "behaviour_logprobs")
        sizes.append(sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] in names))
        loads[of_group] += sizes[-1]
    assert (np.diff(reader[np.argsort(rows)]) >= 0).all()
    assert rows.size == 0 or (reader.min() >= 0 and reader.max() < num_readers)
    assert loads.max() <= sum(sizes) / num_readers + max(sizes, default=0)


def read_all(path: Path) -> None:
    read_meta(path)
    read_index(path)
    read_groups(path)


def test_missing(path: Path) -> None:
    for read in (read_meta, read_index, read_groups):
        with pytest.raises(UserError, match="no such file"):
            read(path)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.7, 0.99])
def test_truncated(path: Path, keep: float) -> None:
    write_ledger(path, [make_group(i, "cw", [50, 60]) for i in range(20)], fates=["train"] * 20, meta={})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(UserError, match=r"ledger = .*damaged.*delete it and run again"):
        read_all(path)


def test_one_flipped_bit_in_the_log_probs(path: Path) -> None:
    write_ledger(path, [make_group(1, "cw", [500, 500])], fates=["train"], meta={})
    names = pq.ParquetFile(path).schema.names
    column = next(
        pq.ParquetFile(path).metadata.row_group(0).column(i)
        for i in range(len(names))
        if pq.ParquetFile(path).metadata.row_group(0).column(i).path_in_schema.startswith("behaviour_logprobs")
    )
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    for read in (read_groups, lambda file: read_tokens(file, [0])):
        with pytest.raises(UserError, match="damaged"):
            read(path)


def test_other_parquet_files_and_newer_ledgers(path: Path) -> None:
    path.parent.mkdir()
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match="not a ledger"):
        read_groups(path)
    metadata = {"nft_megatron.ledger_version": str(ledger.LEDGER_VERSION + 1), "nft_megatron.meta": json.dumps({})}
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), path)
    with pytest.raises(UserError, match="this version reads up to 1"):
        read_groups(path)
