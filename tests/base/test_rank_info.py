"""Which process this is, and a launch that promises more processes than it starts."""

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.base.rank_info import RankInfo, check_launch, rank_info
from nft_megatron.config.load import load_config
from nft_megatron.run.join import init_distributed

BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "28123"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_TASKS_PER_NODE": "2(x2)"}
NAMES = {*BATCH, *PLACE, *TORCHRUN, *STEP}


@pytest.fixture
def environment(monkeypatch):
    def set_to(variables: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, RankInfo()),
        (BATCH, RankInfo()),  # a shell inside an allocation
        (BATCH | PLACE | {"SLURM_NTASKS": "1"}, RankInfo()),
        ({"SLURM_PROCID": "0"} | PLACE, RankInfo()),  # a job that named no number of tasks
        (STEP | PLACE, RankInfo(3, 4, 0, 2)),
        ({k: v for k, v in (STEP | PLACE).items() if k != "SLURM_STEP_NUM_TASKS"}, RankInfo(3, 4, 0, 2)),
        (TORCHRUN | PLACE, RankInfo(1, 4, 1, 2)),
        (TORCHRUN | PLACE | BATCH, RankInfo(1, 4, 1, 2)),  # torchrun in a batch script
        ({"RANK": "0"}, RankInfo()),
    ],
)
def test_launches(environment, variables, expected):
    environment(variables)
    assert rank_info() == expected
    check_launch()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (BATCH | PLACE, "SLURM_NTASKS = 4: the job has 4 tasks, but this process was not started by srun"),
        # sbatch passes on the number of the step that it was called in
        (BATCH | PLACE | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, "SLURM_NTASKS = 4: .*not started by srun"),
        (BATCH | PLACE | {"RANK": "0"}, "SLURM_NTASKS = 4: .*not started by srun"),
        (STEP | {"MASTER_ADDR": "n1"}, "MASTER_PORT = not set: the 4 processes cannot find each other"),
        (TORCHRUN, "MASTER_ADDR = not set: the 4 processes cannot find each other"),
    ],
)
def test_others_that_would_never_join_are_told_at_once(environment, run_config, variables, message):
    """Before torch waits for them, for ten minutes by default."""
    environment(variables)
    with pytest.raises(UserError, match=message) as raised:
        check_launch()
    if "srun" in message:
        assert "start the command with srun, or with torchrun" in raised.value.remedy
    with pytest.raises(UserError, match=message):
        init_distributed(load_config(run_config()))
