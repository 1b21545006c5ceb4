"""Configurations made to hang, to fill memory or to crash: each is refused with one line."""

import contextlib
import itertools
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import dump_config, load_config
from nft_megatron.config.schema import Config
from nft_megatron.config.yaml import parse_yaml

BASE = "run_dir: r\nmodel: {path: m}\ndata: {train: d}\ntrain: {num_steps: 3}\n"
LETTERS = "abcdefghij"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{letter}: &{letter} [{','.join(['*' + before] * 9)}]\n" for before, letter in itertools.pairwise(LETTERS)
)
"""Nine to the ninth values."""
MAP_BOMB = "a: &a {k: 1}\n" + "".join(
    f"{letter}: &{letter} {{p: *{before}, q: *{before}, r: *{before}, s: *{before}}}\n"
    for before, letter in itertools.pairwise(LETTERS)
)
CHAIN = "".join(f"b{i}: &b{i} [*b{i - 1}]\n" if i else "b0: &b0 [1]\n" for i in range(1000))


def in_base(key: str, value: str) -> str:
    section, _, name = key.rpartition(".")
    lines = {"run_dir": "r", "model": "{path: m}", "data": "{train: d}", "train": "{num_steps: 3}"}
    if section:
        inside = {"model": "path: m", "data": "train: d", "train": "num_steps: 3"}.get(section, "")
        kept = "" if inside.startswith(f"{name}:") else inside
        lines[section] = "{" + ", ".join(filter(None, [kept, f"{name}: {value}"])) + "}"
    else:
        lines[name] = value
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


CASES = {
    "bomb under an unknown key": (BASE + BOMB, "its aliases stand for 4.41e+09 values, more than 100,000"),
    "bomb in a known key": (BOMB + in_base("run_dir", "*j"), "its aliases stand for"),
    "bomb in a path list": (BOMB + in_base("data.train", "*j"), "its aliases stand for"),
    "bomb of sections": (BASE + MAP_BOMB, "its aliases stand for"),
    "bomb in a section": (MAP_BOMB + BASE + "rollout: *j\n", "its aliases stand for"),
    "aliases in a key": (BASE + "a: &a [x,x]\n? [*a, *a]\n: 1\n", "unhashable type: 'list'"),
    "bomb of 5": (BASE + "".join(BOMB.splitlines(keepends=True)[:6]), "its aliases stand for"),
    "chain of aliases": (BASE + CHAIN, "its aliases stand for"),
    "a list within itself": (BASE + "z: &a [*a]\n", "an alias stands for a value that contains it"),
    "a section within itself": (
        "train: &t {num_steps: 1, x: *t}\nrun_dir: r\n",
        "an alias stands for a value that contains it",
    ),
    "deep": ("[" * 5000, "nested too deeply"),
    "deep and closed": (BASE + "x: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "deep maps": (BASE + "x: " + "{a: " * 2000 + "1" + "}" * 2000, "nested too deeply"),
    "100,000 brackets": ("[" * 100_000, "nested too deeply"),
    "deep blocks": (BASE + "x:\n" + "".join(" " * i + "-\n" for i in range(1, 600)), "nested too deeply"),
    "deep dashes": (BASE + "x:\n " + "- " * 3000 + "1\n", "nested too deeply"),
    "10 MB": (BASE + "x: " + "a" * 10_000_000, "has 10,000,070 bytes, more than 262,144"),
    "long text": (BASE + "x: " + "a" * 200_000, "no such key"),
    "a list as key": (BASE + "? [a, b]\n: 1\n", "no text, as a key must be"),
    "a map as key": (BASE + "? {a: b}\n: 1\n", "found unhashable key"),
    "null as key": (BASE + "~: 1\n", "no text, as a key must be"),
    "a number as key": (BASE + "5: 1\n", "no text, as a key must be"),
    "a date as key": (BASE + "2020-01-01: 1\n", "no text, as a key must be"),
    "a key twice": (BASE + "seed: 1\nseed: 2\n", "found duplicate key"),
    "a number of 5,000 digits": (in_base("seed", "9" * 5000), "Exceeds the limit (4300 digits)"),
    "a hexadecimal number of 10,000 digits": (in_base("seed", "0x" + "f" * 10_000), "less than 18446744073709551616"),
    "1e30": (in_base("seed", "9" * 30), "less than 18446744073709551616"),
    "1e30 steps": (in_base("train.num_steps", "9" * 30), "less than 2147483648"),
    "1e15 steps": (in_base("train.num_steps", "1" + "0" * 15), "less than 2147483648"),
    "1e12 questions": (in_base("rollout.questions_per_step", "1000000000000"), "less than 2147483648"),
    "1e9 answers": (in_base("rollout.group_size", "1000000000"), "512,000,000,000 answers in a step"),
    "1e12 tokens": (in_base("rollout.max_answer_tokens", "1000000000000"), "less than 2147483648"),
    "1e9 threads": (in_base("parallel.threads", "1000000000"), "less than or equal to 4096"),
    "1e6 processes": (in_base("rollout.processes", "1000000"), "less than or equal to 4096"),
    "1e9 workers": (in_base("verify.workers", "1000000000"), "less than or equal to 4096"),
    "1e12 in a batch": (in_base("rollout.batch_size", "1000000000000"), "less than 2147483648"),
    "1e6 servers": (in_base("fleet.servers", "1000000"), "less than or equal to 4096"),
    "a deadline of 1e300": (in_base("parallel.timeout_seconds", "1.0e300"), "less than or equal to 1000000000"),
    "1e300 questions a round": (in_base("rollout.oversample", "1.0e300"), "less than or equal to 1000"),
    "an infinite rate": (in_base("optimizer.learning_rate", ".inf"), "a finite number"),
    "a rate that is none": (in_base("optimizer.learning_rate", ".nan"), "a finite number"),
    "true as a number": (in_base("train.num_steps", "true"), "a valid integer"),
    "a date as a number": (in_base("train.num_steps", "2020-01-02"), "a valid integer"),
    "a set": (in_base("data.train", "!!set {a}"), "data.train"),
    "bytes": (in_base("run_dir", "!!binary aGVsbG8="), "run_dir"),
    "a tag that calls": (BASE + "x: !!python/object/apply:os.system [touch harm]\n", "could not determine a constructor"),
    "a tag that names": (BASE + "x: !!python/name:os.system\n", "could not determine a constructor"),
    "a tag with another kind": (BASE + "x: !!bool maybe\n", "does not fit its tag"),
    "a date that is none": (BASE + "x: 2020-13-45\n", "month must be in 1..12"),
    "null byte in a path": (in_base("run_dir", '"a\\0b"'), "run_dir = a\\x00b: has a control character"),
    "null byte in a list": (in_base("data.train", '[d, "a\\0b"]'), "has a control character"),
    "half a character": (in_base("run_dir", '"a\\uD800b"'), "has half a character, U+D800"),
    "half a character in a key": (BASE + '"\\uDC00": 1\n', "has half a character, U+DC00"),
    "half a character deep inside": (
        in_base("data.chat_template_kwargs", '{a: [{"x": "\\uDFFF"}]}'),
        "has half a character, U+DFFF",
    ),
    "beyond Unicode": (BASE + 'x: "\\U00110000"\n', "chr() arg not in range"),
    "a path of 5,000 letters": (in_base("run_dir", "/tmp/" + "a" * 5000), "is longer than a path may be"),
    "a long path of short names": (in_base("run_dir", "/tmp" + "/a" * 3000), "is longer than a path may be"),
    "control characters": (BASE + 'x: "\x01"\n', "character U+0001 is not allowed"),
    "escapes in a key": (BASE + '"\\e[31mRED\\e]0;title\\a": 1\n', "\\x1b[31mRED\\x1b]0;title\\x07 = 1: no such key"),
    "two documents": (BASE + "---\na: 1\n", "another document"),
    "tabs": ("a:\t1\n\tb: 2\n", "found character"),
    "binary": (b"\x00\xff\x80", "is not UTF-8"),
    "UTF-16": (BASE.encode("utf-16"), "is not UTF-8"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_configuration_is_refused_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    monkeypatch.chdir(tmp_path)
    content, message = CASES[case]
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert message in str(refused.value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 2500
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.stop=" + "[" * 3000, "nested too deeply"),
        ("rollout.stop=&a [*a]", "a value that contains it"),
        ("data.train=caf\udce9", "character U+DCE9 is not allowed"),
        ("=3", "is not of the form"),
        (".=3", "no such key"),
        ("a.b.c.d=3", "no such key"),
        ("train..x=3", "no such key"),
        ("train.num_steps." + "x." * 2000 + "y=1", "is a value, not a section"),
        ("z." + "x." * 2000 + "y=1", "no such key"),
    ],
)
def test_a_hostile_override_is_refused_with_one_line(tmp_path: Path, override: str, message: str):
    (tmp_path / "c.yaml").write_text(BASE)
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "c.yaml", [override])
    assert message in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize("path", ["a\0b", "a\ud800", "x" * 300, "/x" * 3000, "~nobody-of-that-name/c.yaml"])
def test_a_path_that_no_file_can_have(path: str):
    with pytest.raises(UserError, match=r"^CONFIG = "):
        load_config(path)


def test_aliases_that_repeat_little_are_welcome():
    shared = "a: &a [1, 2]\nb: {c: *a, d: *a}\n<<: {e: 3}\n"
    assert parse_yaml(shared) == {"a": [1, 2], "b": {"c": [1, 2], "d": [1, 2]}, "e": 3}
    wide = "a: &a [" + "x, " * 999 + "x]\nb: [" + "*a, " * 97 + "*a]\n"
    assert len(parse_yaml(wide)["b"]) == 98
    with pytest.raises(ValueError, match=r"aliases stand for 1.01e\+05 values"):
        parse_yaml(wide.replace("b: [", "b: [*a, *a, "))
    assert parse_yaml("x: " + "[" * 190 + "]" * 190) and parse_yaml("x: '[[[[' \ny: ']]]]'")


def test_every_whole_number_has_an_upper_bound():
    """Each sizes something: answers, processes, seconds, layers."""
    unbounded, nodes = [], [("", Config.model_json_schema())]
    while nodes:
        where, node = nodes.pop()
        if isinstance(node, dict):
            if node.get("type") == "integer" and not {"maximum", "exclusiveMaximum"} & node.keys():
                unbounded.append(where)
            nodes += [(f"{where}/{key}", child) for key, child in node.items()]
        elif isinstance(node, list):
            nodes += [(where, child) for child in node]
    assert not unbounded


SCALARS = st.one_of(
    st.text(max_size=8),
    st.integers(),
    st.floats(),
    st.sampled_from(
        ["~", "1e400", "0x1f", "&a", "*a", "!!set", "!!binary", "<<", "? ", "- ", "{", "[", "\t", "\x85", "2020-02-30", "---"]
    ),
)
KEYS = [*Config.model_fields, "train.num_steps", "rollout", "data.train", "slurm.time", "5", "~"]


@pytest.mark.slow
@settings(max_examples=3000)
@given(
    st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from([": ", ":\n  - ", ": {a: ", ": [", " "]), SCALARS), max_size=6)
)
@example([("data", ": {a: ", "!!set")])
def test_whatever_the_file_says_it_is_read_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_text(
        BASE + "".join(f"{key}{between}{value}\n" for key, between, value in lines), encoding="utf-8", errors="replace"
    )
    with contextlib.suppress(UserError):
        dump_config(load_config(path))
