"""One recorded step under every layout: losses, all gradients and the new weights are the same, and they are the paper's.

The reference is Eq. 10 written out over transformers' model in float64, one answer at a time, and AdamW in float64. That
Megatron-Core's own model says the same, each sequence alone through its own attention, without packing or any parallelism, is
``test_megatrons_own_attention_agrees``.
"""

import re
from pathlib import Path

import pytest
from launcher import World
from megatron_alone import alone_in_megatron
from paper_step import Outcome, assert_equal, gradient_error, paper, read_outcome
from parity_worker import MUTATIONS, Run, measure
from recorded_step import ALGORITHMS, LAYOUTS, REPRESENTATIVE, Layout, write_config
from safetensors.torch import load_file
from slow import slow_beside


def outcomes(world: World, configs: list[Path], ledger: Path, mutation: str | None = None) -> list[Outcome]:
    runs = [Run(config, ledger, config.parent / "out") for config in configs]
    world(measure, runs, mutation)
    return [read_outcome(run.out) for run in runs]


@pytest.fixture(scope="module")
def expected(models, ledger) -> dict[str, Outcome]:
    return {kind: paper(folder, ledger) for kind, folder in models.items()}


@pytest.mark.parametrize("name", slow_beside(LAYOUTS, REPRESENTATIVE))
def test_every_layout_computes_the_papers_step(world, models, ledger, expected, tmp_path, name):
    layout = LAYOUTS[name]
    configs = [write_config(tmp_path / kind, folder, layout) for kind, folder in models.items()]
    for kind, measured in zip(models, outcomes(world(layout.num_processes), configs, ledger), strict=True):
        assert_equal(measured, expected[kind])


@pytest.fixture(scope="module")
def expected_of_all(models, ledger) -> dict[str, Outcome]:
    return {name: paper(models["untied"], ledger, name) for name in ALGORITHMS}


@pytest.mark.parametrize(
    "name", slow_beside(["alone", "tensor 2", "pipeline 2 interleaved", "data 2", "context 2"], ["alone", "context 2"])
)
def test_every_algorithm_computes_its_papers_step(world, models, ledger, expected_of_all, tmp_path, name):
    """Losses of tokens and of whole groups of answers, the latter's tokens on several context ranks."""
    configs = [
        write_config(tmp_path / str(i), models["untied"], LAYOUTS[name], algorithm) for i, algorithm in enumerate(ALGORITHMS)
    ]
    measured_of_all = outcomes(world(LAYOUTS[name].num_processes), configs, ledger)
    for algorithm, measured in zip(ALGORITHMS, measured_of_all, strict=True):
        assert_equal(measured, expected_of_all[algorithm])


def test_megatrons_own_attention_agrees(world, models, ledger, expected, tmp_path):
    """Each sequence alone through an unmodified GPTModel with Megatron-Core's own attention and rotary positions."""
    for kind, model in models.items():
        world(1)(alone_in_megatron, model, ledger, tmp_path / kind)
        for i, reference in enumerate(expected[kind].gradients):
            measured = load_file(tmp_path / kind / f"gradient_{i}.safetensors")
            assert len(measured) >= 31
            for name, gradient in measured.items():
                largest = max(reference[re.sub("[qkv]_proj", f"{part}_proj", name)].abs().max() for part in "qkv")
                assert (gradient - reference[name]).abs().max() / largest < 1e-5, name


def test_right_answers_alone_leave_ranks_without_a_token(world, models, ledger, tmp_path):
    """RFT on more data ranks than right answers: some hold a pack without any loss token."""
    config = write_config(tmp_path / "rft", models["tied"], Layout(8), algorithm="rft")
    (measured,) = outcomes(world(8), [config], ledger)
    assert measured.num_empty > 0
    assert_equal(measured, paper(models["tied"], ledger, "rft"))


@pytest.mark.parametrize(
    "several", ["tensor 2 × context 2", pytest.param("tensor 2 × pipeline 2 × context 2", marks=pytest.mark.slow)]
)
def test_bfloat16_is_within_its_own_noise(world, models, ledger, expected, tmp_path, several):
    """Parallel bfloat16 is as far from float64 as one process is, to a factor that rounding in another order explains."""
    errors = {}
    for name in ("alone", several):
        layout = LAYOUTS[name]
        config = write_config(tmp_path / name / "untied", models["untied"], layout, dtype="bfloat16")
        (measured,) = outcomes(world(layout.num_processes), [config], ledger)
        errors[name] = gradient_error(measured, expected["untied"])[0]
    alone, parallel = errors.values()
    assert 1e-3 < alone < 0.1, "bfloat16 has 8 significant bits"
    assert parallel < 2 * alone


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_faults_of_others_would_be_found(world, models, ledger, expected_of_all, tmp_path, mutation):
    """Each planted fault moves a gradient by a hundred times the tolerance and more."""
    algorithm, layout = (
        "infonca" if "whole answers" in mutation else "nft",
        LAYOUTS["data 2" if "data" in mutation else "context 2"],
    )
    config = write_config(tmp_path / "mutated", models["untied"], layout, algorithm)
    (measured,) = outcomes(world(layout.num_processes), [config], ledger, mutation)
    assert gradient_error(measured, expected_of_all[algorithm])[0] > 1e-3
