"""YAML 1.2 ↔ values: ``1e-6`` is a number; ``24:00:00``, ``on`` and ``yes`` are text; a duplicate key is an error.

ruamel.yaml is imported on first use, so that ``--help`` does not pay for it.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError

_MOST_BYTES = 1 << 18
_DEEPEST = 200
_MOST_VALUES = 100_000


def read_sections(path: Path) -> dict[str, Any]:
    """The mapping in a file of at most 256 KiB. Raises :class:`UserError` if it is anything else, or not YAML in UTF-8."""
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise UserError("CONFIG", path, f"has {size:,} bytes, more than {_MOST_BYTES:,}", "start from a file in examples/")
    data = path.read_bytes()
    try:
        tree = parse_yaml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"is not UTF-8: line {line} has the byte 0x{data[error.start]:02x}"
        raise UserError("CONFIG", path, problem, "save the file as UTF-8") from error
    except ValueError as error:
        raise UserError("CONFIG", path, f"not readable as YAML: {error}", "correct that line") from error
    if not isinstance(tree, dict):
        raise UserError("CONFIG", path, "contains no sections", "start from a file in examples/")
    return tree


def parse_yaml(text: str) -> Any:
    """The value of ``text``: of at most 100,000 values, aliases replaced. Raises ``ValueError`` with line, column and problem.

    >>> parse_yaml("{learning_rate: 1e-6, time: 24:00:00, name: on}")
    {'learning_rate': 1e-06, 'time': '24:00:00', 'name': 'on'}
    >>> parse_yaml("seed: 1\\nseed: 2\\n")
    Traceback (most recent call last):
    ValueError: line 2, column 1: found duplicate key "seed" with value "2" (original value: "1")
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning
    from ruamel.yaml.reader import ReaderError

    if _depth(text) > _DEEPEST:  # the parser takes the square of it
        raise ValueError("the values are nested too deeply")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            tree = YAML(typ="safe", pure=True).load(text)  # without line and value in its errors, the parser in C is faster
        if (num_values := _num_values(tree, {})) > _MOST_VALUES:
            raise ValueError(f"its aliases stand for {num_values:.3g} values, more than {_MOST_VALUES:,}")
        return tree
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: character U+{error.character:04X} is not allowed") from error
    except RecursionError as error:
        raise ValueError("the values are nested too deeply") from error
    except (LookupError, AttributeError, TypeError) as error:  # what the library makes of a tag with another kind of value
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {error})") from error


def _depth(text: str) -> int:
    """The deepest nesting of brackets; more than the real one where texts contain opening brackets alone."""
    steps = (1 if char in "[{" else -1 for char in re.sub(r"[^][{}]++", "", text))
    return max(itertools.accumulate(steps), default=0)


def _num_values(tree: Any, known: dict[int, float]) -> float:
    """The values in ``tree``, keys included, each as often as aliases repeat it; ``known`` are those of containers by id.

    Raises ``ValueError`` for a container within itself, and for a text that no file can hold.

    >>> _num_values({"a": [1, 2]}, {})
    5
    """
    if isinstance(tree, str) and not tree.isascii():
        try:
            tree.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text {tree[:60]!r} has half a character, U+{ord(tree[error.start]):04X}") from error
    if not isinstance(tree, (dict, list, tuple, set)):
        return 1
    if id(tree) not in known:
        known[id(tree)] = math.inf  # until all of it is counted
        inner = [*tree.keys(), *tree.values()] if isinstance(tree, dict) else tree
        known[id(tree)] = 1 + sum(_num_values(value, known) for value in inner)
    elif known[id(tree)] == math.inf:
        raise ValueError("an alias stands for a value that contains it")
    return known[id(tree)]


def dump_yaml(tree: Any) -> str:
    """``tree`` as block-style YAML, keys in order, that :func:`parse_yaml` reads back equal.

    >>> print(dump_yaml({"seed": 1, "optimizer": {"learning_rate": 1e-6}, "run_dir": "on"}), end="")
    seed: 1
    optimizer:
      learning_rate: 1e-06
    run_dir: on
    """
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False  # type: ignore
    yaml.sort_base_mapping_type_on_output = False  # type: ignore
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()
