"""Joins the processes of a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager

from nft_megatron.base.rank_info import check_launch, rank_info
from nft_megatron.collect.build import num_cores
from nft_megatron.config.schema import Config
from nft_megatron.model.topology import Topology, distributed
from nft_megatron.run.environment import export_environment


def init_distributed(config: Config) -> AbstractContextManager[Topology]:
    """This process's topology under ``config.parallel``, until the block ends. Called on every rank.

    Raises:
        UserError: the sizes of ``parallel`` do not divide the number of processes, or not all of those were started.
    """
    check_launch()
    export_environment(config)
    parallel = config.parallel
    return distributed(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        virtual_pipeline=parallel.virtual_pipeline,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
        expert=parallel.expert,
        timeout_seconds=parallel.timeout_seconds,
        control_timeout_seconds=config.rollout.step_deadline_seconds,
        threads=parallel.threads or max(1, num_cores() // rank_info().local_size),
        seed=config.seed % 2**63 + 1,  # Megatron adds to it, and torch takes 64 bits
    )
