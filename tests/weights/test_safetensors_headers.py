"""Whatever a safetensors header says, the reader and the safetensors library agree on it: refused, or the same tensors."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from nft_megatron.base.errors import UserError
from nft_megatron.weights.hf_reader import DTYPES, HFReader, refuse_non_finite

NAMES = st.sampled_from(["a", "b", "c", "__metadata__", "", "a\n", "ä", "\ud800"])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 4), max_size=3),
)
SIZES = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def headers(draw) -> tuple[dict, int]:
    """A right header with a few changes, and the number of bytes of data."""
    header: dict = {}
    end = 0
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4)):
        dtype, shape = draw(st.sampled_from(list(DTYPES))), draw(SIZES)
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    size = end
    for _ in range(draw(st.integers(0, 2))):
        change = draw(st.sampled_from(["entry", "value", "offset", "gone", "same", "size", "more", "order"]))
        tensors = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
        if change == "size":
            size = max(0, size + draw(st.integers(-4, 4)))
        elif change == "more" or not tensors:
            header[draw(NAMES)] = draw(ODD)
        elif change == "order":
            header = dict(reversed(header.items()))
        else:
            name = draw(st.sampled_from(tensors))
            entry = dict(header[name])
            if change == "gone":
                del header[name]
            elif change == "same":
                header[draw(NAMES)] = entry
            elif change == "entry":
                entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))] = draw(ODD)
                header[name] = entry
            elif change == "value":
                entry["dtype"] = draw(st.sampled_from([*DTYPES, "F4", "C64", "U16", "f32"]))
                header[name] = entry
            elif isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2:
                first, last = entry["data_offsets"]
                if isinstance(first, int) and isinstance(last, int):
                    shift = draw(st.integers(-8, 8))
                    entry["data_offsets"] = [first + shift, last + draw(st.sampled_from([0, shift]))]
                    header[name] = entry
    return header, size


def write(folder: Path, text: bytes, size: int, length: int | None = None) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(
        (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(range(256)) * (size // 256 + 1)
    )
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + size)
    return path


def agree(text: bytes, size: int, length: int | None = None) -> bool:
    """Whether the library accepts it. Asserts that the reader does the same, and reads the same bytes."""
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name), text, size, length)
        try:
            with safe_open(path, framework="numpy") as file:
                kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError:
            with pytest.raises(UserError, match="is not a complete safetensors file"):
                HFReader(Path(name))
            return False
        if not set(kinds.values()) <= set(DTYPES):
            with pytest.raises(UserError, match="has an unknown dtype"):
                HFReader(Path(name))
            return True
        with HFReader(Path(name)) as reader:
            assert {key: place.shape for key, place in reader.places.items()} == shapes
            assert {key: place.dtype for key, place in reader.places.items()} == {
                key: DTYPES[kind] for key, kind in kinds.items()
            }
            with safe_open(path, framework="pt") as file:
                for key, shape in shapes.items():
                    if math.prod(shape) and shape:
                        ours, theirs = reader.read(key, 0, 0, shape[0]), file.get_tensor(key)
                        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        return True


def as_text(header: dict) -> bytes:
    return json.dumps(header).encode("utf-8", "surrogatepass")


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
LIKE_JSON = {
    "right": (f'{{"a":{ENTRY}}}', True),
    "spaces behind": (f'{{"a":{ENTRY}}}    ', True),
    "spaces before": (f'  {{"a":{ENTRY}}}', None),
    "twice the same name": (f'{{"a":{ENTRY},"a":{ENTRY}}}', None),
    "twice the same key": ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', None),
    "another key": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}', None),
    "three offsets": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', False),
    "exponent": ('{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', False),
    "leading zero": ('{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', False),
    "minus zero": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', None),
    "comment": (f'{{"a":{ENTRY}/**/}}', False),
    "trailing comma": (f'{{"a":{ENTRY},}}', False),
    "entry a list": ('{"a":["F32",[1],[0,4]]}', None),
    "metadata a number": (f'{{"a":{ENTRY},"__metadata__":{{"x":1}}}}', None),
    "metadata null": (f'{{"a":{ENTRY},"__metadata__":null}}', None),
    "half a character": (f'{{"\\ud800":{ENTRY}}}', None),
    "empty": ("{}", None),
    "nothing": ("", False),
    "sizes that overflow": ('{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', False),
}


@pytest.mark.parametrize("case", LIKE_JSON)
def test_texts_that_only_some_parsers_accept(case: str):
    """None: whatever the library's version says."""
    text, accepted = LIKE_JSON[case]
    assert agree(text.encode(), 0 if case == "empty" else 4) in ((True, False) if accepted is None else (accepted,))


@pytest.mark.parametrize("length", [0, 1, 2**31, 100_000_001, 2**63, 2**64 - 1])
def test_lengths_that_are_none(length: int):
    assert not agree(f'{{"a":{ENTRY}}}'.encode(), 4, length)


@given(headers())
@settings(deadline=None, max_examples=100, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_changed_header(case: tuple[dict, int]):
    agree(as_text(case[0]), case[1])


@pytest.mark.slow
@given(headers())
@example(
    (
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        8,
    )
)
@example(
    (
        {
            "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
            "b": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        },
        0,
    )
)
@settings(deadline=None, max_examples=4000, print_blob=True, suppress_health_check=list(HealthCheck))
def test_fuzz_changed_headers(case: tuple[dict, int]):
    agree(as_text(case[0]), case[1])


@pytest.mark.slow
@given(headers(), st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=2000, print_blob=True, suppress_health_check=list(HealthCheck))
def test_fuzz_changed_bytes(case: tuple[dict, int], changes: list[tuple[int, bytes]]):
    text = bytearray(as_text(case[0]))
    for position, replacement in changes:
        text[position % len(text) : position % len(text) + len(replacement)] = replacement
    agree(bytes(text), case[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_named(tmp_path: Path, dtype: torch.dtype, value: float):
    tensor = torch.ones(3, 4).to(dtype)
    assert refuse_non_finite("model.path", tmp_path, "w", tensor) is tensor
    tensor[1, 2] = value
    if math.isinf(value) and dtype is torch.float8_e4m3fn:
        return  # has no infinity: the largest number
    with pytest.raises(UserError, match=f"w holds numbers that are not finite in {str(dtype).removeprefix('torch.')}"):
        refuse_non_finite("model.path", tmp_path, "w", tensor)


def test_nothing_is_finite_too(tmp_path: Path):
    refuse_non_finite("model.path", tmp_path, "w", torch.empty(0))
