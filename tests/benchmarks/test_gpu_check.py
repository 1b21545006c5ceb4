"""The GPU check on the CPU, with tiny sizes, so that the script never rots; and its deadlines."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from waiting import until

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402


def check(out: Path, *arguments: str) -> tuple[list[dict], str]:
    """The check's figures and table."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(out), "--work", str(out), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=2950)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((out / "gpu_check_cpu.json").read_text())
    text = (out / "gpu_check_cpu.txt").read_text()
    assert text in done.stdout
    assert [path.name for path in out.iterdir()] and not list(out.glob("gpu_check_*/"))  # the work folder is gone
    return figures, text


def facts_of(figures: list[dict]) -> dict[str, dict]:
    assert [figure["result"] for figure in figures] == ["ok"] * len(figures), figures
    return {figure["stage"]: figure["facts"] for figure in figures}


def check_recorded(found: dict[str, dict], reference: str, stage: str) -> None:
    """The CPU's step twice, in two processes: the same numbers, to the bit."""
    assert found[stage]["distance"] == 0.0
    assert found[stage]["summary"] == found[reference]["summary"]
    assert found[stage]["summary"]["grad_norm"] > 0 and found[stage]["num_moved"] > 0


def check_training(found: dict) -> None:
    packs = found["packs"]
    assert found["tokens_per_second"] == pytest.approx(packs["tokens"] / found["seconds"]["update"])
    assert packs["positions"] < packs["tokens"] < packs["pairs"]
    assert found["memory"]["planned"] > found["memory"]["plan"]["parameters"] > 0
    assert found["mfu"] is None


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_stage_runs_on_the_cpu_and_says_so(tmp_path):
    figures, text = check(tmp_path, "--seconds", "2900")
    found = facts_of(figures)
    assert gpu_check.NO_GPU in text
    assert "| tiny sizes in place of: 1.5B, packs of 16K, Transformer Engine (not used: local layers) |" in text
    assert list(found) == [stage.key for stage in gpu_check.STAGES]
    assert all(stage.what in text for stage in gpu_check.STAGES)
    check_recorded(found, "recorded-cpu-float32", "recorded-float32")
    check_recorded(found, "recorded-cpu", "recorded-te")
    for key in ("1.5b", "1.5b-local", "7b-slice", "1.5b-offload"):
        check_training(found[key])
    offloaded = found["1.5b-offload"]["memory"]["plan"]
    assert offloaded["offloaded"] == round(offloaded["optimizer"] / 2)
    assert sum(kernel["share"] for kernel in found["1.5b"]["kernels"]) > 0.5
    assert found["1.5b"]["repeats_to_the_bit"] is True
    assert found["1.5b-deterministic"]["deterministic"] and found["1.5b-deterministic"]["repeats_to_the_bit"]
    assert found["nccl"]["bytes"] == 2 * (4 * 256_000 + 7)


def stage(key: str, seconds: float = 60) -> gpu_check.Stage:
    return gpu_check.Stage(key, f"stage {key}", seconds, ())


def run(tmp_path: Path, key: str, code: str, seconds: float = 60) -> gpu_check.Outcome:
    return gpu_check.run_stage(stage(key), [sys.executable, "-c", code], tmp_path, seconds, os.environ)


def test_a_stage_that_hangs_is_ended_with_its_children_and_leaves_what_it_found(tmp_path):
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
pathlib.Path({str(tmp_path / "stuck.json")!r}).write_text('{{"shows": "half of it"}}')
print("last words", flush=True)
time.sleep(600)
"""
    outcome = run(tmp_path, "stuck", code, seconds=3)
    assert (outcome.result, outcome.shows) == ("out of time", "half of it — last words")
    status = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    until(lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_stage_that_fails_says_why_and_the_table_has_all(tmp_path):
    failed = run(tmp_path, "failed", "raise SystemExit('no such kernel | at all')")
    good = gpu_check.Outcome("versions", "versions", "ok", 1.0, {"device": "NVIDIA H200", "on_gpu": True, "torch": "2.13.0"})
    assert (failed.result, failed.shows) == ("failed", "no such kernel | at all")
    lines = gpu_check.table([good, failed]).splitlines()
    assert lines[0] == "# NVIDIA H200 · torch 2.13.0 · Transformer Engine not there"
    assert gpu_check.NO_GPU not in lines
    assert lines[-1].endswith("| no such kernel / at all |") and lines[-1].count("|") == 5


def test_no_stage_begins_after_the_time_of_all_is_up(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(gpu_check, "run_stage", lambda stage, *_: begun.append(stage.key))
    outcomes = gpu_check.check([stage("late")], tmp_path, {}, seconds=5)
    assert begun == [] and [outcome.result for outcome in outcomes] == ["not run"]


def test_wheels_and_archives_are_installed_without_a_network(tmp_path):
    """Of two versions of a wheel the newer, and an archive's content beside it."""
    from zipfile import ZipFile

    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        with ZipFile(wheels / f"tiny_thing-{version}-py3-none-any.whl", "w") as wheel:
            info = f"tiny_thing-{version}.dist-info"
            wheel.writestr("tiny_thing.py", f"version = {version!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny_thing\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    (tmp_path / "compiled.py").write_text("answer = 42\n")
    with tarfile.open(wheels / "compiled.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "compiled.py", "compiled.py")
    gpu_check.install(wheels, site)
    env = gpu_check.environment(site)
    code = "import compiled, tiny_thing; print(compiled.answer, tiny_thing.version)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "42 2.0\n", done.stderr
