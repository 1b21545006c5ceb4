"""The LM head's Triton kernels: in Triton's interpreter against float64 formulas, compiled for a GPU, and their memory traffic.

The interpreter must be chosen before Triton is imported, hence processes of their own (lm_head_kernel_worker.py).
"""

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_head_reference import VOCAB, assert_all_close, problem, reference
from torch.utils._python_dispatch import TorchDispatchMode

from nft_megatron.base.ports import free_port
from nft_megatron.model import lm_head
from nft_megatron.model.lm_head import Chunk, LMHead

CASES = [(dtype, padded, entropy) for dtype in (torch.float32, torch.bfloat16) for padded in (64, 128) for entropy in (0, 1)]
"""As in lm_head_kernel_worker.py."""

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton, which torch's CUDA builds bring: pip install triton (190 MB)"
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of one rank, and of each of two."""
    folder = tmp_path_factory.mktemp("interpreted")
    tests = Path(__file__).parents[1]
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    launches = [("alone", {}), *((f"of two {rank}", launch | {"RANK": str(rank)}) for rank in range(2))]
    processes = []
    for name, variables in launches:
        (folder / name).mkdir()
        paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | variables | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(tests / "lm_head_kernel_worker.py"), str(folder / name)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=400)
            assert process.returncode == 0, stderr[-4000:]
    finally:
        for process in processes:
            process.kill()
    alone = torch.load(folder / "alone" / "0.pt")
    return alone, [torch.load(folder / f"of two {rank}" / f"{rank}.pt")["results"] for rank in range(2)]


def assert_right(case: int, two_passes, one_pass) -> None:
    """Log-probs, entropy, gradients of hidden states and weight; loss, log-probs and the same gradients."""
    dtype, padded, with_gradient = CASES[case]
    inputs = problem(13, padded, dtype)
    expected = reference(*inputs, 0.7, "gradient" if with_gradient else "value")
    logprob, _, *gradients = reference(*inputs, 0.7)
    assert torch.equal(two_passes[0], one_pass[1]), "bit for bit"
    assert two_passes[0].max() <= 0
    assert two_passes[3][VOCAB:].eq(0).all() and one_pass[3][VOCAB:].eq(0).all(), "no gradient for padding"
    if dtype is torch.float32:
        assert_all_close(two_passes, expected, 2e-6)
        assert_all_close(one_pass, ((logprob * inputs[3][0]).sum(), logprob, *gradients), 2e-6)
        return
    logits_rounding = 2**-8 * (inputs[0].double() @ inputs[1].double().T).abs().max().item() / 0.7
    assert (two_passes[0].double() - expected[0]).abs().max() < logits_rounding
    assert (two_passes[1].double() - expected[1]).abs().max() < logits_rounding
    for mine, exact in zip((*two_passes[2:], *one_pass[2:]), (*expected[2:], *gradients), strict=True):
        assert (mine.double() - exact).norm() < 0.01 * exact.norm()


@needs_triton
@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_one_rank_computes_what_float64_does(interpreted, case):
    alone, _ = interpreted
    assert_right(case, *alone["results"][case])


@needs_triton
@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_tensor_parallel_ranks_make_one(interpreted, case):
    """With 128 rows the second rank has only padding."""
    _, of_two = interpreted
    (first, first_one_pass), (second, second_one_pass) = (results[case] for results in of_two)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])

    def joined(one, other):
        return (one[0], one[1], (one[2].double() + other[2].double()).to(one[2].dtype), torch.cat([one[3], other[3]]))

    assert_right(case, joined(first, second), joined(first_one_pass, second_one_pass))


@needs_triton
def test_extreme_logits_stay_finite_and_at_most_zero(interpreted):
    alone, _ = interpreted
    assert all(tensor.isfinite().all() for tensor in alone["extreme"])
    assert alone["extreme"][0].max() <= 0


class Traffic(TorchDispatchMode):
    """Bytes of the matrices that torch's operators read and write; those that touch one number a token move none."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.num_bytes = numel, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if not re.match("gather|scatter|empty|slice|select|view|_unsafe_view|alias|new_|detach", name):
            read = args[1:] if name == "copy_" else args
            self._add([*read, *(value for key, value in kwargs.items() if key != "out")])
            self._add(result if isinstance(result, tuple) else [result])
        return result

    def _add(self, values) -> None:
        self.num_bytes["all"] += sum(x.nbytes for x in values if isinstance(x, torch.Tensor) and x.numel() == self.numel)


def traffic_of_operators(dtype: torch.dtype, entropy: str) -> dict[str, float]:
    logits = torch.randn(64, 96).to(dtype)
    chunk = Chunk(slice(0, 64), logits, torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1, dtype=torch.bool))
    head, of_each_token = LMHead(1.0, 96, None, None, 64, entropy), torch.ones(64)
    with Traffic(logits.numel()) as statistics:
        head._local_sums(chunk)
    with Traffic(logits.numel()) as differentiate:
        head.differentiate(chunk, *[of_each_token] * (4 if entropy == "gradient" else 2))
    both = {"statistics": statistics, "differentiate": differentiate}
    return {name: mode.num_bytes["all"] / logits.numel() for name, mode in both.items()}


@pytest.mark.parametrize(
    ("entropy", "statistics", "differentiate"), [("none", 20, 28), ("value", 36, 28), ("gradient", 36, 56)]
)
def test_what_torchs_operators_move(entropy: str, statistics: int, differentiate: int):
    """Bytes a logit in bfloat16, by operator: a pass over the logits is 2, one over the float32 temporaries 4, each way."""
    assert traffic_of_operators(torch.bfloat16, entropy) == {"statistics": statistics, "differentiate": differentiate}


@needs_triton
def test_the_kernels_read_each_logit_twice_and_write_it_once(interpreted):
    """Loads and stores, counted in the interpreter. At most 12 bytes a logit is the goal, for an update with its entropy."""
    alone, _ = interpreted
    assert alone["traffic"] == {
        torch.bfloat16: {"statistics": 2, "differentiate": 4},
        torch.float32: {"statistics": 4, "differentiate": 8},
    }
    assert all(sum(found.values()) <= 12 for found in alone["traffic"].values())


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_they_compile_for_hopper(monkeypatch, tmp_path, dtype: str):
    """PTX for sm_90 with the assumptions of a launch: aligned pointers, rows a multiple of 16. Accesses are vectors."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nft_megatron.model import lm_head_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"logits": f"*{dtype}", "target_row": "*i64", "is_own": "*i1"}
    numbers = ("log_sum_exp", "logprob_grad", "entropy", "entropy_grad")
    block = {"block": lm_head_kernels.BLOCK}
    kernels = [
        (lm_head_kernels.sums_kernel, pointers | {"sums": "*fp32", "num_tokens": "i32", "num_rows": "i32"}, block),
        *(
            (
                lm_head_kernels.gradient_kernel,
                pointers | dict.fromkeys(numbers, "*fp32") | {"num_rows": "i32"},
                block | {"with_entropy": with_entropy},
            )
            for with_entropy in (False, True)
        ),
    ]
    for kernel, signature, constants in kernels:
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name == "num_rows"
        }
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
        ptx = compiled(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": lm_head_kernels.WARPS}).asm["ptx"]
        assert ".target sm_90" in ptx
        assert re.search(r"ld\.global\.v[48]\.b32", ptx), "vectors of 16 bytes"
        assert ("st.global.v" in ptx) == (kernel is lm_head_kernels.gradient_kernel)
        assert "local_depot" not in ptx, "no register spills into memory"


def test_they_are_chosen_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(lm_head, "kernels", lambda: "Triton")

    def chosen(*, fused=True, is_cuda=True, dtype=torch.bfloat16):
        logits = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
        head = LMHead(1.0, 4, None, None, 4, "none", fused)
        return head._kernels(Chunk(slice(0), logits, None, None))

    assert (chosen(), chosen(dtype=torch.float32)) == ("Triton", "Triton")
    assert chosen(is_cuda=False) is chosen(fused=False) is chosen(dtype=torch.float64) is None


def test_without_triton_torchs_operators_remain(monkeypatch):
    monkeypatch.setattr(lm_head, "find_spec", lambda name: None)
    lm_head.kernels.cache_clear()
    try:
        assert lm_head.kernels() is None
    finally:
        lm_head.kernels.cache_clear()
