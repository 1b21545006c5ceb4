"""Rows of data files: Parquet, JSONL, JSON, CSV and Arrow, alone or in a Hugging Face data set folder.

Arrow files from ``datasets.save_to_disk`` are Arrow IPC streams, which pyarrow reads by itself.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nft_megatron.base.bounded import BoundError, bounded
from nft_megatron.base.errors import UserError
from nft_megatron.base.untrusted import is_plain_name, parse_json, read_json_object
from nft_megatron.config.yaml import parse_yaml

Row = dict[str, Any]
_SPLIT = re.compile(r"(?<![a-z])(?:train|test|validation|valid|val|dev|eval)(?![a-z])")
_FRONT_MATTER = re.compile(r"\A---[^\S\n]*+\n(.*?)\n---[^\S\n]*+(?:\n|\Z)", re.DOTALL)
_ROWS_OF_A_PART = 256
_LEAST_BYTES, _RATIO = 256 << 20, 1000
"""What a columnar file may hold, in bytes: one of a megabyte can claim to hold terabytes of one repeated text."""
_PART_BYTES, _PART_SECONDS = 4 << 30, 600.0
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


class _LayoutError(ValueError):
    """The file can be read, but not as rows."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def files_of(
    path: Path, field: str, splits: Sequence[str], config_name: str | None = None, *, is_required: bool = True
) -> list[Path]:
    """``path`` itself, or a data set folder's files of the first of ``splits`` that it has.

    A folder with several configs (subsets) is refused with their names unless ``config_name`` is one of them. Unless it
    ``is_required``, a folder with a single config needs no such name.
    """
    if not path.exists():
        raise UserError(field, path, "no such file or folder", "check the path")
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").exists():
        folders = [folder for folder in sorted(path.iterdir()) if (folder / "state.json").exists()]
        return files_of(_of_split(folders, path, field, splits)[0], field, splits)
    if (path / "state.json").exists():
        return _saved_files(path, field)
    listed = _listed_configs(path)
    grouped = {} if listed else _configs_by_folder(path)
    configs = set(listed or grouped)
    if not configs:
        raise UserError(field, path, f"holds no {', '.join(READERS)} file", "name a file or a data set folder")
    names = ", ".join(sorted(configs))
    if not is_required and len(configs) == 1:
        config_name = None
    if config_name is None and len(configs) > 1:
        problem = f"has several configs, whose questions may overlap: {names}"
        raise UserError(field, path, problem, f"choose one: data.config_name={min(configs)}, or name the files themselves")
    if config_name is not None and config_name not in configs:
        problem = f"{field} = {path} has no such config; it has {names}"
        raise UserError("data.config_name", config_name, problem, "name one of those")
    name = min(configs) if config_name is None else config_name
    if listed:
        return _of_listed(listed[name], path, field, splits)
    if any((path / name / file).exists() for file in ("dataset_dict.json", "state.json")):
        return files_of(path / name, field, splits)
    return _of_split(grouped[name], path, field, splits)


def _saved_files(path: Path, field: str) -> list[Path]:
    """The files that a data set of ``datasets.save_to_disk`` consists of."""
    remedy = "save the data set again, or name the files themselves"
    listed = read_json_object(path / "state.json", field, remedy).get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not names or not all(map(is_plain_name, names)):
        raise UserError(field, path / "state.json", "does not list the data set's files", remedy)
    return [path / str(name) for name in names]


def _configs_by_folder(path: Path) -> dict[str, list[Path]]:
    """The files of each config, which is named after the folders they are in, apart from ``data`` and splits."""
    found = [file for file in path.rglob("*") if file.suffix in READERS and file.name not in _NOT_ROWS]
    found = [file for file in found if not any(part[0] in "._" for part in file.relative_to(path).parts)]  # __MACOSX, …
    files = [file for file in found if file.suffix in _FIRST] or found
    configs: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(files):
        parts = [part for part in file.relative_to(path).parts[:-1] if part != "data" and not _SPLIT.search(part)]
        configs["/".join(parts) or "default"].append(file)
    return dict(configs)


def _listed_configs(path: Path) -> dict[str, list[tuple[str, list[Path]]]]:
    """The configs in the header of README.md, as on the Hugging Face Hub: the files here that each names, by split."""
    readme = path / "README.md"
    header = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    try:
        tree = parse_yaml(header[1]) if header else None
    except ValueError:
        return {}  # a page for people: a mistake in it does not concern the data
    listed = tree.get("configs") if isinstance(tree, dict) else None
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    found = {str(entry.get("config_name", "default")): _matching(path, entry.get("data_files")) for entry in entries}
    return {name: files for name, files in found.items() if files}


def _matching(path: Path, data_files: Any) -> list[tuple[str, list[Path]]]:
    """The readable files that ``data_files`` matches, with the split if it is given: a pattern, or a list of patterns or of
    {split, path}."""
    found = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, patterns = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("", entry)
        texts = [text for text in (patterns if isinstance(patterns, list) else [patterns]) if isinstance(text, str) and text]
        inside = [text for text in texts if not text.startswith("/") and ".." not in text and "://" not in text]
        inside = [text for text in inside if text.count("**") < 2]  # each "**" walks the folder once more
        files = {file for text in inside for file in path.glob(text) if file.is_file() and file.suffix in READERS}
        if files:
            found.append((str(split or ""), sorted(files)))
    return found


def _of_listed(files: list[tuple[str, list[Path]]], path: Path, field: str, splits: Sequence[str]) -> list[Path]:
    for split in splits:
        if found := [file for name, group in files if name == split for file in group]:
            return sorted(set(found))
    return _of_split(sorted({file for _, group in files for file in group}), path, field, splits)


def _of_split(candidates: list[Path], path: Path, field: str, splits: Sequence[str]) -> list[Path]:
    """Those named after the first split that occurs, else the only candidate. Taking all would train on a test split."""
    for split in splits:
        named = re.compile(f"(?<![a-z]){split}(?![a-z])")
        if found := [candidate for candidate in candidates if named.search(str(candidate.relative_to(path)))]:
            return found
    if len(candidates) != 1:
        names = ", ".join(candidate.name for candidate in candidates[:5])
        problem = f"has several parts but none named {' or '.join(splits)}: {names}"
        raise UserError(field, path, problem, "name the files themselves")
    return candidates


def rows_of(file: Path, field: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of ``file``; from a columnar file only ``columns`` (any case), or everything when it has none of them."""
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(field, file, f"unknown kind of file {file.suffix!r}", f"use one of {', '.join(READERS)}")
    number = 0
    try:
        for row in reader(file, columns):
            yield row
            number += 1
    except _LayoutError as error:
        raise UserError(field, file, error.problem, error.remedy) from error
    except UnicodeDecodeError as error:
        raise UserError(field, file, f"is not UTF-8: {error}", "save it as UTF-8") from error
    except (pa.ArrowException, ValueError, OSError, csv.Error) as error:
        problem = f"unreadable at row {number}: {str(error).splitlines()[0]}"
        hint = " and has one JSON object per line" if reader is _jsonl_rows else ""
        raise UserError(field, file, problem, f"check that the file is complete{hint}, or download it again") from error


def _chosen(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower() in columns]


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(file) as parquet:
        chosen = _chosen(parquet.schema_arrow.names, columns)
        yield from _rows_within_reason(file, parquet.iter_batches(batch_size=_ROWS_OF_A_PART, columns=chosen or None))


def _arrow_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    with pa.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"  # the file format, also called Feather; data sets are streams
        source.seek(0)
        with pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source) as reader:
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            names = _chosen(reader.schema.names, columns) or reader.schema.names
            yield from _rows_within_reason(file, (batch.select(names) for batch in batches))


def _rows_within_reason(file: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    """The rows of ``batches``, as long as they hold no more than a file of this size can be meant to hold."""
    most, taken, parts = _LEAST_BYTES + _RATIO * file.stat().st_size, 0, _parts(batches)
    remedy = "look into it: it repeats a text millions of times, or is made to exhaust memory"
    while True:
        try:
            with bounded(_PART_SECONDS, _PART_BYTES):
                part = next(parts, None)
                rows = [] if part is None or taken + part.nbytes > most else _python_rows(part)
        except (BoundError, MemoryError) as error:
            raise _LayoutError(
                f"{_PART_BYTES >> 20:,} MiB of memory do not hold {_ROWS_OF_A_PART} rows of it", remedy
            ) from error
        if part is None:
            return
        taken += part.nbytes
        if taken > most:
            raise _LayoutError(f"has {file.stat().st_size:,} bytes and holds more than {most:,}", remedy)
        yield from rows


def _parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """A few rows at a time, without dictionaries, so that each part's size is that of its rows."""
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_OF_A_PART):
            part = batch.slice(start, _ROWS_OF_A_PART)
            columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in part.columns]
            yield pa.RecordBatch.from_arrays(columns, names=part.schema.names)


def _python_rows(batch: pa.RecordBatch) -> list[Row]:
    """Rows as they were written: 0.1 for the float32 0.10000000149, text for bytes."""
    types = [(entry.name, entry.type) for entry in batch.schema if re.search("float|half|binary", str(entry.type))]
    return [row | {name: _as_written(row[name], type_) for name, type_ in types} for row in batch.to_pylist()]


def _as_written(value: Any, type_: pa.DataType) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, float) and not pa.types.is_float64(type_):
        return float(str((np.float32 if pa.types.is_float32(type_) else np.float16)(value)))
    if isinstance(value, list):
        return [_as_written(item, type_.value_type) for item in value]
    if isinstance(value, dict):
        return {name: _as_written(item, type_.field(name).type) for name, item in value.items()}
    return value


def _jsonl_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield _object(parse_json(line), line)


def _json_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """An array of objects, alone or as the only array of an object; or one object per line."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        yield from _jsonl_rows(file, columns)
        return
    for row in _rows_in(content, columns):
        yield _object(row, json.dumps(row))


def _rows_in(content: Any, columns: Sequence[str]) -> list[Any]:
    """The rows of a JSON file: an array, alone or as the only one of an object; an object of columns, as pandas writes it, or
    of rows by their names; or a single row."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise ValueError("not an array of JSON objects")
    values = list(content.values())
    arrays = [name for name, value in content.items() if isinstance(value, list)]
    if len(arrays) == 1 and all(isinstance(item, dict) and "role" not in item for item in content[arrays[0]]):
        return content[arrays[0]]
    is_named = any(name.lower() in columns for name in content)
    if is_named and all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
        return [dict(zip(content, items, strict=True)) for items in zip(*values, strict=True)]
    if all(isinstance(value, dict) for value in values) and len({tuple(value) for value in values}) == 1:
        return [{name: content[name][key] for name in content} for key in values[0]] if is_named else values
    if is_named or not arrays:
        return [content]
    if len(arrays) > 1:
        raise _LayoutError(f"has several arrays of rows: {', '.join(arrays)}", "write each into a file of its own")
    raise _LayoutError(f"has an array {arrays[0]!r} whose items are not all objects", "write one object per question")


def _object(row: Any, text: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {text[:40]!r}")
    return row


def _csv_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        if twice := [name for name in reader.fieldnames if name and reader.fieldnames.count(name) > 1]:
            raise _LayoutError(f"has two columns called {twice[0]!r}", "rename or remove one of them")
        for row in reader:
            if None in row:
                raise ValueError(f"more values than the {len(row) - 1} columns of the header")
            yield row


_FIRST = (".parquet", ".jsonl", ".arrow")
"""In a folder, the others are looked for only if it has none of these: they are often copies or descriptions."""
READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _jsonl_rows,
    ".arrow": _arrow_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
"""How each kind of file is read."""
