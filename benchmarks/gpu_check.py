"""One check of a machine with a GPU, in at most eight minutes: do training steps run on it, are they right, how fast are they?

    make gpu-check                                            # on the machine with the GPU
    python benchmarks/gpu_check.py --wheels FOLDER            # without a network: first install what FOLDER has
    python benchmarks/gpu_check.py --stages recorded-te 1.5b  # some of the stages

Every stage (gpu_stages.py) is a process of its own with a deadline, so that one that fails or hangs leaves the others. A small
recorded step is trained with and without Transformer Engine and compared with the CPU's; a 1.5B model with packs of 16K tokens
and eight layers of a 7B model give tokens/s, model FLOPs utilisation, memory beside `plan`, kernels and a checkpoint. Two GPUs
would be needed for tensor, pipeline, context and data parallelism and for the broadcast to vLLM: NCCL refuses two ranks on one.

The table and all figures are written to results/gpu_check_<device>.txt and .json. Without a GPU the stages run on the CPU with
tiny sizes: that shows that the script works, and measures nothing.

FOLDER of --wheels holds wheels for the machine's Python and torch, and archives (*.tar.*) of what has no wheel, such as a
compiled Transformer Engine. benchmarks/gpu_wheels.txt lists what a machine with torch and transformers lacks:

    pip download --no-deps --dest FOLDER --python-version 3.12 --only-binary :all: -r benchmarks/gpu_wheels.txt
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKER = ROOT / "benchmarks" / "gpu_stages.py"
NO_GPU = "NO GPU: nothing was measured on one. The sizes are tiny and only show that the script runs."
ROOM = 40 << 30
"""Bytes that the largest stage may write."""


@dataclass(frozen=True)
class Stage:
    """One process: ``arguments`` of gpu_stages.py, with those of a GPU on one. ``seconds``: its deadline there."""

    key: str
    what: str
    seconds: float
    arguments: tuple[str, ...]
    on_gpu: tuple[str, ...] = ()
    hides_gpu: bool = False


BFLOAT16, FLOAT32 = ("recorded", "--dtype", "bfloat16"), ("recorded", "--dtype", "float32")
LARGE = ("--shape", "1.5b", "--tokens", "16384", "--packs", "8")
STAGES = (
    Stage("versions", "versions, Transformer Engine's library", 60, ("versions",)),
    Stage("attention", "attention without Transformer Engine", 60, ("attention",)),
    Stage("recorded-cpu", "recorded step on the CPU, bf16", 60, (*BFLOAT16, "--without-te"), hides_gpu=True),
    Stage("recorded-te", "recorded step, bf16, Transformer Engine", 60, (*BFLOAT16, "--reference", "recorded-cpu")),
    Stage("recorded-local", "the same without it", 60, (*BFLOAT16, "--without-te", "--reference", "recorded-cpu")),
    Stage("1.5b", "1.5B, packs of 16K, Transformer Engine", 110, ("train", "--profile", "--save"), LARGE),
    Stage(
        "7b-slice",
        "8 layers of 7B, packs of 8K",
        80,
        ("train", "--profile"),
        ("--shape", "7b-slice", "--tokens", "8192", "--packs", "8"),
    ),
    Stage("1.5b-local", "1.5B without Transformer Engine", 90, ("train", "--profile", "--save", "--without-te"), LARGE),
    Stage("recorded-cpu-float32", "recorded step on the CPU, float32", 60, (*FLOAT32, "--without-te"), hides_gpu=True),
    Stage("recorded-float32", "recorded step, float32", 60, (*FLOAT32, "--without-te", "--reference", "recorded-cpu-float32")),
    Stage("1.5b-offload", "1.5B, half of the optimizer on the host", 70, ("train", "--offload", "0.5"), LARGE),
    Stage("nccl", "NCCL group of one", 40, ("nccl",), ("--tokens", "16384")),
    Stage(
        "1.5b-deterministic",
        "1.5B without Transformer Engine, kernels.deterministic",
        80,
        ("train", "--save", "--without-te", "--set", "kernels.deterministic=true"),
        LARGE,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ``ok``, ``failed``, ``out of time`` or ``not run``; ``facts`` are what it had found by then."""

    stage: str
    what: str
    result: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    log: str = ""

    @property
    def title(self) -> str:
        """What the stage does, and whether it did it without the library that it is about."""
        lacks = self.what.endswith(", Transformer Engine") and self.facts.get("layers") == "local"
        return f"{self.what} (not used: local layers)" if lacks else self.what

    @property
    def shows(self) -> str:
        """Its line in the table: what it found, and the last line of what it said if it did not succeed."""
        said = [str(self.facts.get("shows", ""))]
        if self.result != "ok" and self.log:
            said.append(self.log.strip().splitlines()[-1][:200])
        return " — ".join(text for text in said if text)


def run_stage(stage: Stage, command: Sequence[str], folder: Path, seconds: float, env: Mapping[str, str]) -> Outcome:
    """Run ``command`` for at most ``seconds``; then it and its children are killed."""
    start, log = time.monotonic(), folder / f"{stage.key}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(env), start_new_session=True)
        try:
            result = "ok" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            result = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = folder / f"{stage.key}.json"
    facts = json.loads(found.read_text()) if found.exists() else {}
    text = "" if result == "ok" else log.read_text(errors="replace")[-4000:]
    return Outcome(stage.key, stage.what, result, round(time.monotonic() - start, 1), facts, text)


def install(wheels: Path, site: Path) -> None:
    """Unpack what ``wheels`` holds into ``site``: of every distribution the newest that fits this Python."""
    for archive in sorted(wheels.glob("*.tar.*")):
        shutil.unpack_archive(archive, site, filter="data")
    names = sorted({path.name.split("-")[0] for path in wheels.glob("*.whl")})
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    if names:
        subprocess.run([*pip, "--find-links", str(wheels), "--target", str(site), *names], check=True)


def environment(site: Path | None) -> dict[str, str]:
    """Of every stage: this checkout, before what was installed for it."""
    paths = [str(ROOT), *([str(site)] if site else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def work_folder() -> str | None:
    """Memory if there is enough: the disk is not what is measured."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOM else None


def check(stages: Sequence[Stage], folder: Path, env: Mapping[str, str], seconds: float) -> list[Outcome]:
    """All ``stages`` in turn, until ``seconds`` have passed."""
    begin, on_gpu, outcomes = time.monotonic(), False, []
    for stage in stages:
        left = seconds - (time.monotonic() - begin)
        if left < min(stage.seconds, 10):
            outcomes.append(Outcome(stage.key, stage.what, "not run", 0.0, log="the time was up"))
            continue
        if stage.on_gpu and not on_gpu:
            stage = replace(stage, what=f"tiny sizes in place of: {stage.what}")
        command = [sys.executable, str(WORKER), *stage.arguments, *(stage.on_gpu if on_gpu else ())]
        command += ["--folder", str(folder), "--key", stage.key]
        own = {**env, "CUDA_VISIBLE_DEVICES": ""} if stage.hides_gpu else env
        # the deadlines are a GPU's; a CPU shares its cores, and there the whole check has the only one
        outcome = run_stage(stage, command, folder, min(stage.seconds, left) if on_gpu else left, own)
        on_gpu |= bool(outcome.facts.get("on_gpu"))
        outcomes.append(outcome)
        print(f"{outcome.stage}: {outcome.result}, {outcome.seconds:.0f} s  {outcome.shows}", flush=True)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """For people."""
    known = outcomes[0].facts
    parts = [f"# {known.get('device', 'unknown device')}"]
    parts += [f"torch {known['torch']}"] if "torch" in known else []
    parts += [f"Megatron-Core {known['megatron']}"] if "megatron" in known else []
    parts.append(f"Transformer Engine {known.get('transformer_engine') or 'not there'}")
    lines = [" · ".join(parts), *([] if known.get("on_gpu") else [NO_GPU]), ""]
    lines += ["| stage | result | s | what it shows |", "|---|---|---:|---|"]
    lines += [f"| {row.title} | {row.result} | {row.seconds:.0f} | {row.shows.replace('|', '/')} |" for row in outcomes]
    for row in outcomes:
        if kernels := row.facts.get("kernels") if known.get("on_gpu") else None:
            lines += ["", f"{row.what}: the kernels that take the most of an update"]
            lines += [f"{kernel['share']:7.1%} {kernel['calls']:6} × {kernel['kernel'][:100]}" for kernel in kernels[:12]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="install these first, into a folder of this check's own")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", choices=[stage.key for stage in STAGES], help="default: all")
    parser.add_argument("--seconds", type=float, default=480.0, help="of all stages together (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table and the figures")
    parser.add_argument("--work", type=Path, help="folder for models and checkpoints (default: /dev/shm, or the temporary one)")
    options = parser.parse_args(arguments)
    chosen = [stage for stage in STAGES if not options.stages or stage.key in ("versions", *options.stages)]
    with tempfile.TemporaryDirectory(prefix="gpu_check_", dir=options.work or work_folder()) as name:
        folder = Path(name)
        if options.wheels:
            install(options.wheels, folder / "site")
        outcomes = check(chosen, folder, environment(folder / "site" if options.wheels else None), options.seconds)
    text = table(outcomes)
    device = re.sub(r"[^a-z0-9]+", "_", str(outcomes[0].facts.get("device", "unknown")).lower())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"gpu_check_{device}.txt").write_text(text)
    (options.out / f"gpu_check_{device}.json").write_text(
        json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n"
    )
    print(f"\n{text}")
    return 0 if all(outcome.result == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
