"""The import floors of docs/architecture.md, held by reading every import statement of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nft_megatron"
FLOORS = {
    **dict.fromkeys(
        [
            "__init__",
            "errors",
            "background",
            "files",
            "records",
            "config",
            "config_load",
            "run_folder",
            "heartbeat",
            "ending",
            "time_limit",
            "stop",
            "place",
            "data",
        ],
        0,
    ),
    **dict.fromkeys(
        [f"verify.{name}" for name in ("boxes", "expressions", "grade", "modes", "numbers", "reasons", "simplerl")], 0
    ),
    **dict.fromkeys([f"rollout.fleet.{name}" for name in ("dispatch", "health", "member", "guard", "access", "section")], 0),
    **dict.fromkeys(["evaluate.benchmarks", "evaluate.statistics", "evaluate.table", "evaluate.overlap"], 0),
    **dict.fromkeys(["section", "algorithms"], 0),
    **dict.fromkeys(
        [f"slurm.{name}" for name in ("section", "job_folder", "decide", "cause", "tools", "job", "steps", "render")], 0
    ),
    **dict.fromkeys([f"slurm.{name}" for name in ("preflight", "agent", "guests")], 3),
    **dict.fromkeys(["layout", "slurm", "weights", "convert", "observe", "plan", "watchdog"], 1),
    **dict.fromkeys(["model", "rollout", "verify"], 2),
    **dict.fromkeys(
        ["tokenizer", "ask", "answering", "collect", "rounds", "ahead", "gate", "publish", "checkpoints", "evaluate"], 3
    ),
    **dict.fromkeys(["run", "host", "ranks", "assemble", "replay", "train", "doctor"], 3),
    **dict.fromkeys(["cli", "commands", "__main__"], 5),
}
PEERS = ("model", "rollout", "verify")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def floor(module: str) -> int:
    """Of the longest listed prefix of ``module``."""
    while module not in FLOORS:
        module, _, last = module.rpartition(".")
        assert module, f"nft_megatron/{last} is not in the table of floors: add it here and to docs/architecture.md"
    return FLOORS[module]


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it but for the types alone."""
    names = set()
    tree = ast.parse(path.read_text())
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
    }
    for node in set(ast.walk(tree)) - for_types:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    """Those of this package, as module names below it."""
    return {name.removeprefix("nft_megatron.") for name in names if name.startswith("nft_megatron.")} & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_its_own_floor_or_lower(module):
    for imported in own(imports(MODULES[module])):
        assert floor(imported) <= floor(module), (
            f"{module} (floor {floor(module)}) imports {imported} (floor {floor(imported)})"
        )


@pytest.mark.parametrize("module", MODULES)
def test_rooms_of_floor_two_never_import_each_other(module):
    room = module.split(".")[0]
    if room in PEERS:
        others = {name.split(".")[0] for name in own(imports(MODULES[module])) if floor(name) == 2} - {room}
        assert not others, f"{module} imports {others}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_stay_in_their_rooms(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    room = module.split(".")[0]
    if floor(module) == 0:
        assert not roots & {"torch", "transformers", "megatron"}, f"{module} is on floor 0"
    if floor(module) == 1:
        file_format = "torch.distributed.checkpoint" if room == "convert" else "none"  # of .metadata; no groups in it
        grouped = {name for name in imports(MODULES[module]) if "distributed" in name and not name.startswith(file_format)}
        assert not grouped, f"{module} is on floor 1: no process groups"
    assert "megatron" not in roots or room == "model", f"{module}: only model/ imports Megatron"
    assert not roots & {"vllm", "httpx", "aiohttp"} or room == "rollout", f"{module}: only rollout/ speaks to vLLM"


def test_no_circles():
    graph = {module: own(imports(path)) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' → '.join((*trail, module))}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", [name for name in MODULES if floor(name) == 0])
def test_floor_zero_loads_without_torch(module):
    name = "nft_megatron" if module == "__init__" else f"nft_megatron.{module}"
    code = f"import {name}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
