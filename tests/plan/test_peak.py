"""The predicted peak against that of a process that trains, as benchmarks/plan_memory.py measures it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plan_worker import small_shape

from nft_megatron.plan.memory import stage_memory

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "plan_memory.py"
NUM_TOKENS = 4096
PEAKS = [
    ("float32", "none"),
    pytest.param("bfloat16", "selective", marks=pytest.mark.slow),
    pytest.param("bfloat16", "full", marks=pytest.mark.slow),
]


@pytest.mark.timeout(1000)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of a process from /proc")
@pytest.mark.parametrize(("dtype", "recompute"), PEAKS)
def test_the_peak_of_an_update_is_within_a_tenth(make_layout, dtype: str, recompute: str):
    command = [sys.executable, str(BENCHMARK), "--tokens", str(NUM_TOKENS), "--one", "small", dtype, recompute]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    shape = small_shape(
        4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4, num_query_groups=2, head_dim=64, vocab_size=32768
    )
    layout = make_layout(recompute=recompute, micro_batch_tokens=NUM_TOKENS)
    planned = stage_memory(shape, layout, 0, dtype=dtype, on_gpu=False, num_micro_batches=1)
    assert planned.peak == pytest.approx(measured["peak"], rel=0.1)
    assert planned.parameters + planned.gradients + planned.optimizer == pytest.approx(measured["built"], rel=0.05)
