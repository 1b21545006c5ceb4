"""Recorded data: model outputs, human solutions, public benchmarks and training questions. It belongs to others.

So it is not part of the project, whose own cases (own_answers, own_questions, pathological_answers) test the same in every
clone. If NFT_MEGATRON_BENCH names a folder with recorded data (default: shared/bench next to the repository), more tests run.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

BENCH = Path(os.environ.get("NFT_MEGATRON_BENCH", Path(__file__).parents[1].parent / "shared" / "bench"))
Test = TypeVar("Test", bound=Callable[..., None])


def recorded(*names: str) -> Callable[[Test], Test | None]:
    """Marks a test that reads these files. Without them the test does not exist: nothing to skip, nothing to fail."""
    return lambda test: test if all((BENCH / name).is_file() for name in names) else None


def bench_rows(name: str) -> list[dict[str, Any]]:
    with (BENCH / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
