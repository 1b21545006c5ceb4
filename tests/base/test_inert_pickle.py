"""Pickles read as data: what Python writes comes back equal, and what would run stays inert."""

import collections
import contextlib
import os
import pathlib
import pickle
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nft_megatron.base.inert_pickle import InertDict, Record, UnreadablePickle, read_pickle

KEYS = st.one_of(st.text(), st.integers(-(2**59), 2**59), st.none(), st.booleans(), st.tuples(st.integers(0, 9), st.text()))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.frozensets(st.text())
)
DATA = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(KEYS, inner), st.tuples(inner, inner), st.sets(st.text())),
    max_leaves=12,
)


@given(DATA, st.sampled_from([2, 3, 4, 5]))
@settings(deadline=None, max_examples=100)
def test_plain_data_comes_back(value: object, protocol: int):
    assert read_pickle(pickle.dumps(value, protocol), {}) == value


def test_shared_and_circular_data_keeps_its_shape():
    shared: list = [1]
    circle: list = [shared, shared]
    circle.append(circle)
    found = read_pickle(pickle.dumps(circle), {})
    assert found[0] is found[1]
    assert found[2] is found


def test_objects_become_records_of_what_the_pickle_says():
    found = read_pickle(pickle.dumps({"path": Path("/a"), "ordered": collections.OrderedDict(a=1)}), {})
    assert isinstance(found["path"], Record)
    assert (found["path"].name, found["path"].args) == ("pathlib.PosixPath", ("/", "a"))
    assert found["ordered"] == {"a": 1}
    assert type(found["ordered"]) is InertDict


def test_listed_functions_are_called_and_listed_values_stand_for_names():
    data = pickle.dumps((Path("a"), os.sep.join))
    assert read_pickle(pickle.dumps(Path("a")), {"pathlib.PosixPath": lambda *parts: parts}) == ("a",)
    assert read_pickle(b"cmath\npi\n.", {"math.pi": 3.0}) == 3.0
    with pytest.raises(UnreadablePickle, match=r"names pathlib\.PosixPath, which is not data"):
        read_pickle(data, {}, refuse_others=True)


class Calls:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


HARM = "touch harm"
HARMFUL = {
    "reduce": pickle.dumps(Calls(os.system, HARM)),
    "eval": pickle.dumps(Calls(eval, "__import__('os').system('touch harm')")),
    "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("x") + b"tR.",
    "inst": b"(" + text(HARM) + b"ios\nsystem\n.",
    "obj": b"(cos\nsystem\n" + text(HARM) + b"o.",
    "newobj": b"\x80\x02cos\nsystem\n" + text(HARM) + b"\x85\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\n" + text(HARM) + b"\x85}\x92.",
    "called twice": b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R" + text(HARM) + b"\x85R.",
    "persistent": b"\x80\x02" + text(HARM) + b"Q.",
    "extension": b"\x80\x02\x82\x01.",
    "setstate of a record": b"\x80\x02cos\nsystem\n)R}" + text("__setstate__") + b"cos\nsystem\nsb" + text(HARM) + b"b.",
}


@pytest.mark.parametrize("case", HARMFUL)
@pytest.mark.parametrize("refuse_others", [False, True])
def test_nothing_is_executed(case: str, refuse_others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    try:
        found = read_pickle(HARMFUL[case], {}, refuse_others=refuse_others)
    except UnreadablePickle:
        found = None
    assert found is None or (type(found) is Record and not refuse_others)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "target", ["cpathlib\nPosixPath\n", "cpathlib\nPurePath\n", "cbuiltins\ndict\n", "ctorch\nSize\n", "}", "]"]
)
def test_no_attribute_is_set_of_a_class_or_of_data(target: str):
    """A pickle that gives a class an attribute would change it for the whole process."""
    state = b"N}" + text("name") + text("POLLUTED") + b"s\x86"
    with pytest.raises(UnreadablePickle, match="sets attributes of"):
        read_pickle(b"\x80\x02" + target.encode() + state + b"b.", {"torch.Size": tuple})
    assert pathlib.PurePosixPath("/a/b").name == "b"


BOMBS = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "long": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "negative long": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b".",
    "deep list": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "deep tuple": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "deep tuple as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "deep record": b"\x80\x02" + b"cos\nsystem\n" * 30_000 + b")" + b"\x85R" * 30_000 + b".",
    "deep marks": b"\x80\x02" + b"(" * 300_000 + b".",
    "keys that all hash alike": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(9))
    + b"u.",
    "list of itself, called": b"\x80\x02]q\x00h\x00aR.",
    "unhashable key": b"\x80\x02}]Ns.",
    "odd items": b"\x80\x02}(Nu.",
    "empty": b"",
    "no stop": b"\x80\x02N",
    "empty stack": b"\x80\x02.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_cost_no_more_than_their_size(case: str):
    try:
        found = read_pickle(BOMBS[case], {})
    except UnreadablePickle:
        return
    assert case in ("memo", "deep list", "deep tuple", "deep record")
    assert found is None or isinstance(found, list | tuple | Record)


RECORDED = Path(__file__).parents[1] / "recorded_runs/v0_1/run/checkpoints/step_000002/.metadata"


def test_every_prefix_of_a_pickle_is_damaged():
    data = RECORDED.read_bytes()
    for length in range(0, len(data), 7):
        with pytest.raises(UnreadablePickle):
            read_pickle(data[:length], {})


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 17_000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))
@example([(11, b"c")])
@example([(11, b"r\xff\xff\xff\x7f")])
@settings(deadline=None, max_examples=3000, suppress_health_check=list(HealthCheck), print_blob=True)
def test_fuzz_a_changed_pickle_is_read_or_refused(changes: list[tuple[int, bytes]]):
    data = bytearray(RECORDED.read_bytes())
    for position, replacement in changes:
        data[position : position + len(replacement)] = replacement
    with contextlib.suppress(UnreadablePickle):
        read_pickle(bytes(data), {})


@pytest.mark.slow
@given(st.binary(max_size=200))
@example(b"c")
@example(b"}(N")
@settings(deadline=None, max_examples=5000, print_blob=True)
def test_fuzz_any_bytes_are_read_or_refused(data: bytes):
    with contextlib.suppress(UnreadablePickle):
        read_pickle(b"\x80\x04" + data + b".", {})
