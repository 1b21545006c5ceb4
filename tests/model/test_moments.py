"""Adam's moments in bfloat16: Megatron-Core's precision-aware optimizer over a stand-in for Transformer Engine's Adam."""

from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from moments_worker import FusedAdam, compare
from parity_worker import Run
from recorded_step import Layout, write_config

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import load_config
from nft_megatron.config.sections import OptimizerConfig
from nft_megatron.model.optimizer import _moments

SMALL = {"first_moment": "bfloat16", "second_moment": "bfloat16"}


def config_of(folder, model, **optimizer):
    return write_config(folder, model, Layout(2, optimizer={"beta2": 0.95, **optimizer}), dtype="bfloat16")


@pytest.fixture(scope="module")
def found(world, models, ledger, tmp_path_factory) -> dict:
    """What two data-parallel ranks found."""
    folder = tmp_path_factory.mktemp("moments")
    runs = [
        Run(config_of(folder / name, models["untied"], **moments), ledger, folder / name)
        for name, moments in (("exact", {}), ("small", SMALL))
    ]
    (folder / "checkpoints").mkdir()
    return world(2)(compare, *runs, folder / "checkpoints")


def test_moments_are_kept_in_bfloat16_and_master_weights_in_float32(found):
    assert found["dtypes"] == {
        "exp_avg": "torch.bfloat16",
        "exp_avg_sq": "torch.bfloat16",
        "master_param": "torch.float32",
    }


def test_updates_differ_by_the_moments_rounding_alone(found):
    """Gradients have the same norm, and are clipped: ε is large beside what clipping leaves, so that its factor counts."""
    exact, small = found["norms"]
    assert small[0] == exact[0]
    assert small[1] == pytest.approx(exact[1], rel=0.02)
    assert found["moved"] > 1e-4
    assert 0 < found["difference"] < 0.02 * found["moved"]


def test_a_run_resumes_to_the_bit(found):
    assert found["restored"]
    assert found["resumed to the bit"]


def test_checkpoints_are_the_same_whatever_the_dtype_of_the_moments(found):
    assert found["small loads exact"], "rounded once"
    assert found["exact loads small"]


def test_the_stand_in_has_the_interface_of_transformer_engine():
    real = pytest.importorskip("transformer_engine.pytorch.optimizers", reason="needs Transformer Engine").FusedAdam
    assert signature(FusedAdam).parameters.keys() <= signature(real).parameters.keys()
    for name in ("initialize_state", "get_unscaled_state", "set_scaled_state"):
        assert list(signature(getattr(FusedAdam, name)).parameters) == list(signature(getattr(real, name)).parameters)


def test_without_transformer_engines_layers_they_are_refused():
    for field in SMALL:
        settings = OptimizerConfig(beta2=0.95, **{field: "bfloat16"})
        with pytest.raises(UserError, match=f"optimizer.{field} = bfloat16: needs a GPU and Transformer Engine"):
            _moments(settings, SimpleNamespace(transformer_impl="local"))
    assert _moments(OptimizerConfig(), SimpleNamespace(transformer_impl="local")) == {}


@pytest.mark.parametrize(
    ("optimizer", "dtype", "problem"),
    [
        ({**SMALL, "beta2": 0.999}, "bfloat16", r"second_moment = bfloat16: would stop shrinking with optimizer.beta2 = 0.999"),
        ({**SMALL, "beta1": 0.997}, "bfloat16", r"first_moment = bfloat16: would stop shrinking with optimizer.beta1 = 0.997"),
        ({**SMALL, "cpu_offload": 0.5}, "bfloat16", "is kept on the GPU, but optimizer.cpu_offload = 0.5"),
        (SMALL, "float32", "needs a bfloat16 model"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, optimizer: dict, dtype: str, problem: str):
    path = write_config(tmp_path / "run", tmp_path, Layout(1, optimizer={"beta2": 0.95, **optimizer}), dtype=dtype)
    with pytest.raises(UserError, match=problem):
        load_config(path)


def test_a_bfloat16_moment_shrinks_from_what_is_allowed():
    """The premise of the refusal: m ← β·m leaves some m unchanged for β = 0.999, none for 0.996."""
    moments = torch.arange(128, 256, dtype=torch.float32).bfloat16()  # every significand
    for beta, stuck in ((0.999, 128), (0.997, 38), (0.996, 0)):
        assert int((beta * moments.float()).bfloat16().eq(moments).sum()) == stuck
