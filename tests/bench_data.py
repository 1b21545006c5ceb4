"""The development data, which is not part of the project: next to the repository, or in NFT_MEGATRON_BENCH."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(os.environ.get("NFT_MEGATRON_BENCH", Path(__file__).parents[1].parent / "shared" / "bench"))


def bench_file(name: str) -> Path:
    """Its path; the test is skipped where it is absent."""
    if not (BENCH / name).exists():
        pytest.skip(f"{BENCH / name} is absent: set NFT_MEGATRON_BENCH to the folder with the development data")
    return BENCH / name


def bench_rows(name: str) -> list[dict[str, Any]]:
    with bench_file(name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
