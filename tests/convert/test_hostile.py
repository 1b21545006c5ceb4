"""Checkpoints and model folders made to do harm: each is refused with one message, and nothing in them runs."""

import copy
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nft_megatron.base.errors import UserError
from nft_megatron.convert.commands import check, resolve, to_hf, to_megatron

Folder = Path
HARM = b"cposix\nsystem\n(S'touch harm'\ntR."


class Harmful:
    """Leaves a file, then is ``value``."""

    def __init__(self, value: object = None) -> None:
        self.value = value

    def __reduce__(self):
        return eval, (f"(open('harm', 'w'), __import__('pickle').loads({pickle.dumps(self.value)!r}))[1]",)


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def edit_header(folder: Folder, change: Callable[[dict], object]) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    change(header)
    write(path, json.dumps(header).encode(), data)


def write(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def first(header: dict, axes: int = 2) -> str:
    return next(name for name, entry in header.items() if name != "__metadata__" and len(entry["shape"]) == axes)


def edit(name: str, **changes) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        target = first(header) if name == "matrix" else name
        header[target] = {**header[target], **{key: value(header[target]) for key, value in changes.items()}}

    return change


def overlap(header: dict) -> None:
    """Two tensors of the same shape, one place."""
    by_shape: dict[tuple, str] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            other = by_shape.setdefault(tuple(entry["shape"]), name)
            if other != name:
                entry["data_offsets"] = header[other]["data_offsets"]
                return
    raise AssertionError


def index(folder: Folder, weight_map: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def config(folder: Folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def outside(folder: Folder, name: str) -> None:
    header, _ = header_of(folder / "model.safetensors")
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "model.safetensors", target)
    index(folder, {key: name for key in header if key != "__metadata__"})


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.write((size - 8).to_bytes(8, "little"))
        file.truncate(size)


MODEL_FOLDERS: dict[str, tuple[Callable[[Folder], object], str]] = {
    "overlap": (lambda f: edit_header(f, overlap), "not a complete safetensors file"),
    "negative offset": (
        lambda f: edit_header(f, edit("matrix", data_offsets=lambda e: [n - 64 for n in e["data_offsets"]])),
        "not a complete safetensors file",
    ),
    "offset far before the file": (
        lambda f: edit_header(f, edit("matrix", data_offsets=lambda e: [n - 10**9 for n in e["data_offsets"]])),
        "not a complete safetensors file",
    ),
    "negative shape": (
        lambda f: edit_header(f, edit("matrix", shape=lambda e: [-n for n in e["shape"]])),
        "not a complete safetensors file",
    ),
    "fractional shape": (
        lambda f: edit_header(f, edit("matrix", shape=lambda e: [float(n) for n in e["shape"]])),
        "not a complete safetensors file",
    ),
    "fractional offsets": (
        lambda f: edit_header(f, edit("matrix", data_offsets=lambda e: [float(n) for n in e["data_offsets"]])),
        "not a complete safetensors file",
    ),
    "shape of text": (lambda f: edit_header(f, edit("matrix", shape=lambda e: "64")), "not a complete safetensors file"),
    "list of dtypes": (lambda f: edit_header(f, edit("matrix", dtype=lambda e: ["F32"])), "not a complete safetensors file"),
    "whole numbers as weights": (
        lambda f: edit_header(f, lambda h: [e.update(dtype="I16") for n, e in h.items() if n != "__metadata__"]),
        "not floating-point",
    ),
    "name of control characters": (
        lambda f: edit_header(
            f, lambda h: h.update({"a\0\x1b[31mred": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
        ),
        r"a\\x00\\x1b\[31mred",
    ),
    "header longer than the file": (lambda f: write_length(f, 2**63 - 1), "not a complete safetensors file"),
    "header of 2^64": (lambda f: write_length(f, 2**64 - 1), "not a complete safetensors file"),
    "header of 20 GB of holes": (lambda f: sparse(f / "model.safetensors", 20 << 30), "not a complete safetensors file"),
    "deep header": (
        lambda f: write(f / "model.safetensors", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "not a complete safetensors file",
    ),
    "header a list": (lambda f: write(f / "model.safetensors", b"[1,2]"), "not a complete safetensors file"),
    "header of huge numbers": (
        lambda f: write(f / "model.safetensors", b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        "not a complete safetensors file",
    ),
    "index to another folder": (lambda f: outside(f, "../outside.safetensors"), "the name of a file of this folder"),
    "index to an absolute path": (
        lambda f: outside(f, str(f.parent / "away.safetensors")),
        "the name of a file of this folder",
    ),
    "index to passwd": (lambda f: index(f, {"a": "../../../../../../etc/passwd"}), "the name of a file of this folder"),
    "index to NUL": (lambda f: index(f, {"a": "x\0y"}), "the name of a file of this folder"),
    "index to a number": (lambda f: index(f, {"a": 5}), "the name of a file of this folder"),
    "index to a list": (lambda f: index(f, {"a": ["x"]}), "the name of a file of this folder"),
    "index mixed": (lambda f: index(f, {"a": 5, "b": "c"}), "the name of a file of this folder"),
    "index to a long name": (lambda f: index(f, {"a": "x" * 5000}), "the name of a file of this folder"),
    "index a list": (lambda f: index(f, [1]), "the name of a file of this folder"),
    "index to a pipe": (lambda f: (index(f, {"a": "pipe"}), os.mkfifo(f / "pipe")), "names pipe, which is not there"),
    "deep index": (
        lambda f: (index(f, {}), (f / "model.safetensors.index.json").write_text("[" * 200_000)),
        "is nested too deeply",
    ),
    "pickled weights only": (
        lambda f: ((f / "model.safetensors").unlink(), torch.save({"a": Harmful()}, f / "pytorch_model.bin")),
        "has no weights",
    ),
    "1e9 layers": (lambda f: config(f, num_hidden_layers=10**9), "num_hidden_layers = 1000000000: more layers"),
    "1e400 layers": (lambda f: config(f, num_hidden_layers=10**400), "num_hidden_layers"),
    "hidden size of 1e12": (lambda f: config(f, hidden_size=10**12, head_dim=None), "hidden_size"),
    "vocabulary of 1e15": (lambda f: config(f, vocab_size=10**15), "vocab_size"),
    "sizes that are not those of the weights": (
        lambda f: config(f, vocab_size=2**30, hidden_size=2**30),
        "config.json implies",
    ),
    "flags of text": (lambda f: config(f, tie_word_embeddings="false"), "tie_word_embeddings = false: must be true or false"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object but a list"),
    "config a number": (lambda f: (f / "config.json").write_text("5"), "is not a JSON object but a int"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 200_000), "is nested too deeply"),
    "config in UTF-16": (
        lambda f: (f / "config.json").write_bytes((f / "config.json").read_text().encode("utf-16")),
        "is not text in UTF-8",
    ),
    "config with a byte order mark": (
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
        "is not JSON",
    ),
    "config a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "has no config.json"),
    "config of a gigabyte": (lambda f: sparse(f / "config.json", 1 << 30), "has 1,073,741,824 bytes, more than"),
    "architectures of lists": (lambda f: config(f, architectures=[["x"]]), "architectures = .'x'.: no such model family"),
    "architectures a number": (lambda f: config(f, architectures=7), "architectures = 7: no such model family"),
    "architectures empty": (lambda f: config(f, architectures=[]), "no such model family"),
    "rope of text": (lambda f: config(f, rope_scaling="yarn"), "rope_scaling = yarn: must be an object"),
    "layer types a number": (lambda f: config(f, layer_types=5), "layer_types = 5"),
    "deep rope": (lambda f: config(f, rope_scaling=json.loads("[" * 400 + "]" * 400)), "rope_scaling"),
}


def write_length(folder: Folder, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


@pytest.mark.parametrize("case", MODEL_FOLDERS)
def test_a_hostile_model_folder_is_refused(sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(sources["untied"], folder)
    spoil, message = MODEL_FOLDERS[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as refused:
        to_megatron(folder, tmp_path / "out")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 2500
    assert not (tmp_path / "harm").exists()
    assert not list(tmp_path.glob("out")) + list(tmp_path.glob("out.*"))


# ------------------------------------------------------------------------------------------------------------ torch_dist


def edit_index(folder: Folder, change: Callable) -> None:
    path = folder / ".metadata"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


def places_of(content, change: Callable) -> None:
    for name, place in content.storage_data.items():
        if "linear_fc2" in name.fqn and name.offset is not None:
            change(place)


def with_polluted_paths(folder: Folder) -> None:
    """BUILD on a class: once, ``name`` of every path became a constant, and a user's file was deleted."""
    body = b"cpathlib\nPosixPath\nN}X\x04\x00\x00\x00nameX\x08\x00\x00\x00POLLUTEDs\x86b0"
    path = folder / ".metadata"
    path.write_bytes(b"\x80\x02" + body + pickle.dumps(pickle.loads(path.read_bytes()), 2)[2:])


def twice_as_many_chunks(content) -> None:
    for value in content.state_dict_metadata.values():
        if hasattr(value, "chunks"):
            value.chunks = [*value.chunks, *copy.deepcopy(value.chunks)]


TORCH_DIST: dict[str, tuple[Callable[[Folder], object], str]] = {
    "runs a command": (lambda f: (f / ".metadata").write_bytes(HARM), "not the metadata of a torch_dist checkpoint"),
    "runs and is right": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Harmful(pickle.loads((f / ".metadata").read_bytes())))),
        "eval in place of Metadata",
    ),
    "getattr": (
        lambda f: (f / ".metadata").write_bytes(b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."),
        "not the metadata of a torch_dist checkpoint",
    ),
    "class pollution": (with_polluted_paths, "sets attributes of a class"),
    "memo bomb": (lambda f: (f / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x3f."), "NoneType in place of Metadata"),
    "long bomb": (
        lambda f: (f / ".metadata").write_bytes(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"."),
        "a number of 2147483647 bytes",
    ),
    "deep tuple": (
        lambda f: (f / ".metadata").write_bytes(b"\x80\x02})" + b"\x85" * 300_000 + b"Ns."),
        "a nested tuple is no key",
    ),
    "too large": (lambda f: sparse(f / ".metadata", 1 << 30), "has 1073741824 bytes"),
    "chunks of 1e9 layers": (
        lambda f: edit_index(
            f,
            lambda m: [
                setattr(chunk, "sizes", torch.Size([10**9, *list(chunk.sizes)[1:]]))
                for key, value in m.state_dict_metadata.items()
                if "linear_fc2" in key and hasattr(value, "chunks")
                for chunk in value.chunks
            ],
        ),
        "exceeds it",
    ),
    "chunks twice": (lambda f: edit_index(f, twice_as_many_chunks), "overlap"),
    "another folder's file": (
        lambda f: edit_index(f, lambda m: places_of(m, lambda p: setattr(p, "relative_path", "../../etc/passwd"))),
        "is not in its folder",
    ),
    "the folder above as file": (
        lambda f: edit_index(f, lambda m: places_of(m, lambda p: setattr(p, "relative_path", ".."))),
        "is not in its folder",
    ),
    "negative offset": (lambda f: edit_index(f, lambda m: places_of(m, lambda p: setattr(p, "offset", -5))), "is none"),
    "length of 2^62": (lambda f: edit_index(f, lambda m: places_of(m, lambda p: setattr(p, "length", 2**62))), "is none"),
    "length of 2^50": (lambda f: edit_index(f, lambda m: places_of(m, lambda p: setattr(p, "length", 2**50))), "is truncated"),
    "deep manifest": (lambda f: (f / "conversion.json").write_text("[" * 100_000), "is nested too deeply"),
    "manifest a list": (lambda f: (f / "conversion.json").write_text("[]"), "is not a JSON object"),
    "manifest of lists": (
        lambda f: (f / "conversion.json").write_text('{"receipt":null,"tensors":[],"files":{},"source":{}}'),
        "is damaged",
    ),
    "manifest with more": (
        lambda f: (f / "conversion.json").write_text('{"receipt":null,"tensors":{},"files":{},"source":{},"x":1}'),
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", TORCH_DIST)
def test_a_hostile_torch_dist_checkpoint_is_refused(
    sources, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
):
    monkeypatch.chdir(tmp_path)
    (converted / "conversion.json").unlink()
    spoil, message = TORCH_DIST[case]
    spoil(converted)
    with pytest.raises(UserError, match=message):
        to_hf(converted, tmp_path / "out", model=sources["untied"])
    assert Path("/a/b").name == "b"
    assert not (tmp_path / "harm").exists()
    assert not list(tmp_path.glob("out*"))


def archive(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in records.items():
            file.writestr(f"a/{name}", content)


def tensor_pickle(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """``{"model": {"w": …}}`` with a tensor in a storage of four float32."""

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(4) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(stride)
    tensor += b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("model") + b"}" + text("w") + tensor + b"ss."


MP_RANK: dict[str, tuple[Callable[[Path], object], str]] = {
    "runs a command": (lambda p: torch.save({"model": Harmful()}, p), "has no state under 'model'"),
    "compressed bomb": (
        lambda p: archive(p, {"data.pkl": b"\0" * (64 << 20)}, zipfile.ZIP_DEFLATED),
        "its record data.pkl is compressed",
    ),
    "compressed tensor": (
        lambda p: archive(p, {"data.pkl": tensor_pickle(0, (4,), (1,)), "data/0": b"\0" * 16}, zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "no structure": (lambda p: archive(p, {"x": b"1"}), "damaged"),
    "old format": (lambda p: p.write_bytes(b"\x80\x02" + HARM), "damaged"),
    "negative shape": (
        lambda p: archive(p, {"data.pkl": tensor_pickle(-5, (-1, 2), (2, 1)), "data/0": b"\0" * 16}),
        "a tensor of",
    ),
    "beyond its storage": (
        lambda p: archive(p, {"data.pkl": tensor_pickle(0, (5,), (1,)), "data/0": b"\0" * 16}),
        "ends at byte 20 of a storage of 16 bytes",
    ),
    "stride beyond its storage": (
        lambda p: archive(p, {"data.pkl": tensor_pickle(0, (2,), (2**30,)), "data/0": b"\0" * 16}),
        "of a storage of 16 bytes",
    ),
    "storage that is not there": (lambda p: archive(p, {"data.pkl": tensor_pickle(0, (4,), (1,))}), "damaged"),
    "nested without end": (
        lambda p: archive(p, {"data.pkl": b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."}),
        "no state",
    ),
}


@pytest.mark.parametrize("case", MP_RANK)
def test_a_hostile_mp_rank_checkpoint_is_refused(sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    spoil, message = MP_RANK[case]
    spoil(folder / "model_optim_rng.pt")
    with pytest.raises(UserError, match=message):
        to_hf(folder.parent, tmp_path / "out", model=sources["untied"])
    assert not (tmp_path / "harm").exists()


# ------------------------------------------------------------------------------------------- the configuration of a run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not readable as YAML"),
        ("a: !!python/object/apply:os.system ['touch harm']", "could not determine a constructor"),
        (
            "a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" if i else "b0: &b0 [*a]\n" for i in range(40)),
            "aliases",
        ),
        ("model: &m {path: *m}", "undefined alias|contains it"),
        ("[" * 100_000, "nested too deeply"),
        ('model: {path: "a\\0b"}', "has a null byte"),
        ('model: {path: "a\\ud800"}', "has half a character"),
        ("model: {path: " + "a" * 5000 + "}", "is longer than a path may be"),
        ("model: {path: /etc}", "has no config.json"),
        ("model: {path: /nonexistent}", "no such folder"),
    ],
    ids=lambda value: value[:30],
)
def test_a_hostile_run_configuration_is_refused(
    sources, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000004"
    shutil.copytree(converted, checkpoint)
    for name in ("config.json", "conversion.json"):
        (checkpoint / name).unlink(missing_ok=True)
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        to_hf(checkpoint, tmp_path / "out")
    assert str(refused.value).isprintable()
    assert not (tmp_path / "harm").exists() and not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------------------------------------------------------- pointers


@pytest.mark.parametrize("pointer", ["latest", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize(
    "content", [b"", b".", b"..", b"/etc", b"a/../b", b"\xff\xfe", b"a\0b", "²".encode(), b"9" * 5000, b"none", b"\x1b[31m"]
)
def test_a_pointer_names_a_folder_next_to_it(tmp_path: Path, pointer: str, content: bytes):
    (tmp_path / pointer).write_bytes(content)
    with pytest.raises(UserError, match=pointer) as refused:
        resolve(tmp_path, "SRC")
    assert str(refused.value).isprintable()


def test_pointers_that_name_folders(tmp_path: Path):
    for name in ("iter_0000012", "release", "step_000003"):
        (tmp_path / name).mkdir()
    for pointer, content, name in (
        ("latest", "step_000003\n", "step_000003"),
        ("latest_checkpointed_iteration.txt", "12", "iter_0000012"),
        ("latest_checkpointed_iteration.txt", "release", "release"),
    ):
        (tmp_path / pointer).write_text(content)
        assert resolve(tmp_path, "SRC") == tmp_path / name
        (tmp_path / pointer).unlink()


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_is_no_conversions_is_never_deleted(sources, tmp_path: Path, kind: str):
    own = tmp_path / ("out.partial" if kind == "folder" else "own")
    own.mkdir()
    (own / "precious.txt").write_text("x")
    if kind == "link":
        (tmp_path / "out.partial").symlink_to(own)
    elif kind == "file":
        (tmp_path / "out.partial").write_text("x")
    with pytest.raises(UserError, match=r"out\.partial: is in the way, and no conversion's"):
        to_megatron(sources["untied"], tmp_path / "out")
    assert (own / "precious.txt").read_text() == "x"
    assert kind != "file" or (tmp_path / "out.partial").read_text() == "x"


def test_a_checkpoint_with_whole_numbers_is_no_copy_of_the_model(sources, changed):
    name = "model.norm.weight"
    folder = changed(sources["untied"], lambda tensors: tensors.update({name: torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UserError, match=f"dtype: {name}"):
        check(sources["untied"], folder)
