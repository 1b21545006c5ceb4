import re

import pytest
import yaml

from nft_megatron.base.exported import EXPORTED, without_exported
from nft_megatron.config.load import load_config
from nft_megatron.run.environment import export_environment, overruled, trainer_environment

PADDED = {"num_steps": 1, "pad_to_budget": True}
GROWS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.fixture
def config(tmp_path):
    """Loads a configuration with these sections."""

    def load(**sections):
        tree = {"run_dir": "run", "model": {"path": "m"}, "data": {"train": "q.jsonl"}, "train": {"num_steps": 1}}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree | sections))
        return load_config(path)

    return load


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, GROWS),
        ({"parallel": {"pipeline": 8}}, GROWS),
        ({"parallel": {"tensor": 2}}, GROWS | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ({"parallel": {"context": 4}}, GROWS | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ({"parallel": {"tensor": 2}, "cluster": {"gpu": "b200"}}, GROWS),
        ({"parallel": {"tensor": 2}, "kernels": {"device_connections": 8}}, GROWS | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
        ({"kernels": {"allocator": ""}}, {}),
        (
            {"kernels": {"deterministic": True, "allocator": "max_split_size_mb:512"}},
            {
                "PYTORCH_ALLOC_CONF": "max_split_size_mb:512",
                "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                "NCCL_ALGO": "^NVLS",
            },
        ),
    ],
)
def test_the_variables_follow_from_the_configuration(config, sections, expected):
    loaded = config(**sections)
    assert trainer_environment(loaded) == expected
    environ = {"PATH": "/bin"}
    export_environment(loaded, environ)
    export_environment(loaded, environ)
    assert {name: value for name, value in environ.items() if name != EXPORTED} == {"PATH": "/bin", **expected}
    assert without_exported(environ) == {"PATH": "/bin"}
    assert overruled(loaded, environ) == {}


@pytest.mark.parametrize("allocator", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_environment_has_wins_and_is_inherited(config, allocator):
    loaded = config(parallel={"tensor": 2}, kernels={"deterministic": True})
    given = {allocator: "backend:cudaMallocAsync", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    environ = dict(given)
    export_environment(loaded, environ)
    assert given.items() <= environ.items()
    assert [name for name in environ if name.endswith("ALLOC_CONF")] == [allocator]
    assert environ["NCCL_ALGO"] == "^NVLS"
    assert without_exported(environ) == given
    assert overruled(loaded, environ) == {
        "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    }


def test_fp8_is_refused_with_the_reason(config):
    with pytest.raises(ValueError, match=r"kernels\.fp8 = delayed: is not built: .* set it to off"):
        config(kernels={"fp8": "delayed"})
    assert config(kernels={"fp8": "off"}).kernels.fp8 == "off"


def test_train_sets_them_before_torch_is_imported(run_config, tmp_path):
    """In a process of its own, which stops where training would begin."""
    import subprocess
    import sys

    code = """
import os, sys, types
import nft_megatron
stop = types.ModuleType("nft_megatron.train")
stop.train = lambda config: print(os.environ["PYTORCH_ALLOC_CONF"], "torch" in sys.modules)
sys.modules["nft_megatron.train"] = stop
from nft_megatron.cli.main import main
main(["train", sys.argv[1]])
"""
    done = subprocess.run([sys.executable, "-c", code, str(run_config())], capture_output=True, text=True)
    assert done.stdout.split() == ["expandable_segments:True", "False"], done.stderr


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({}, "needs 2 to cluster.gpus_per_node = 8 tensor ranks, which share a node; parallel.tensor = 1"),
        ({"parallel": {"tensor": 16}}, "parallel.tensor = 16"),
        ({"parallel": {"tensor": 2, "sequence_parallel": False}}, "exchanges what sequence parallelism splits"),
        ({"parallel": {"tensor": 2}, "train": {"num_steps": 1}}, "has buffers of one size, but packs have many"),
    ],
)
def test_overlapped_tensor_communication_is_refused_where_it_cannot_work(config, sections, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        config(**{"train": PADDED, **sections}, kernels={"overlap_tensor_communication": True})
    works = config(parallel={"tensor": 8}, train=PADDED, kernels={"overlap_tensor_communication": True})
    assert works.kernels.overlap_tensor_communication


@pytest.mark.parametrize("field", ["first_stage_layers", "last_stage_layers"])
def test_layers_of_a_stage_are_refused_without_stages(config, field):
    with pytest.raises(ValueError, match=rf"parallel\.{field} = 3: divides the layers between pipeline stages"):
        config(parallel={field: 3})
    assert getattr(config(parallel={field: 3, "pipeline": 2}).parallel, field) == 3
