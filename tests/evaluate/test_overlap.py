"""What ``nft-megatron overlap`` prints and writes, on small files."""

import json
from pathlib import Path

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.data.overlap import read_overlapping_ids
from nft_megatron.evaluate.overlap import report_overlap


def words(first: int, last: int) -> str:
    """One word a letter."""
    return " ".join("abcdefghijklmnopqrstuvwxyz"[first:last])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, *texts: str) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in texts))
        return path

    train, one = write("train.jsonl", words(0, 26)), write("one.jsonl", words(3, 26), words(5, 26), "short")
    two, out = write("two.jsonl", "another " * 14), tmp_path / "o.jsonl"
    report_overlap([train], [one, two], n=13, threshold=0.5, out=out)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed if line.startswith(("one", "two"))] == [
        ["one.jsonl", "3", "1", "2", "2"],
        ["two.jsonl", "1", "0", "0", "0"],
    ]
    assert read_overlapping_ids(out, "x") == {"one.jsonl/0", "one.jsonl/1"}
    with pytest.raises(UserError, match=r"--n = 0"):
        report_overlap([train], [one], n=0, threshold=0.5, out=None)
    with pytest.raises(UserError, match=r"--threshold = 0"):
        report_overlap([train], [one], n=13, threshold=0, out=None)
