"""YAML 1.2 ↔ values: ``1e-6`` is a number; ``24:00:00``, ``on`` and ``yes`` are text; a duplicate key is an error.

ruamel.yaml is imported on first use, so that ``--help`` does not pay for it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from nft_megatron.base.errors import UserError


def read_sections(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises :class:`UserError` if it holds anything else, or is not YAML in UTF-8."""
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
    """The value of ``text``. Raises ``ValueError`` with line, column and problem.

    >>> parse_yaml("{learning_rate: 1e-6, time: 24:00:00, name: on}")
    {'learning_rate': 1e-06, 'time': '24:00:00', 'name': 'on'}
    >>> parse_yaml("seed: 1\\nseed: 2\\n")
    Traceback (most recent call last):
    ValueError: line 2, column 1: found duplicate key "seed" with value "2" (original value: "1")
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        return YAML(typ="safe", pure=True).load(text)  # without line and value in its errors, the parser in C is faster
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: character U+{error.character:04X} is not allowed") from error
    except RecursionError as error:
        raise ValueError("the values are nested too deeply") from error


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
