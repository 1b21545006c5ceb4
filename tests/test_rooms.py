"""What import-linter's contracts (pyproject.toml) cannot see: submodules of torch, and what importing a room imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nft_megatron"
WITH_PROCESS_GROUPS = ("model/", "run/", "slurm/preflight.py", "rollout/fleet/")
"""convert/ knows the file format of ``torch.distributed.checkpoint``, which has no groups in it."""


def imported(path: Path) -> set[str]:
    """Absolute names of everything a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_few_places_know_process_groups():
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        grouped = {name for name in imported(path) if name.startswith("torch.distributed")}
        if place.startswith("convert/"):
            grouped = {name for name in grouped if not name.startswith("torch.distributed.checkpoint")}
        assert not grouped or place.startswith(WITH_PROCESS_GROUPS), f"{place} imports {grouped}"


@pytest.mark.parametrize("room", ["base", "algorithms", "config", "lifecycle", "cli", "slurm"])
def test_a_room_loads_without_torch(room):
    """Every file of it: heavy imports happen on use. The exception, slurm/preflight.py, checks a node's GPUs."""
    files = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__", "preflight"}
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint('torch' in sys.modules)"
    modules = [f"nft_megatron.{room}.{name}" for name in sorted(files)]
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
