"""``nft-megatron plan``: from a configuration to its printed plan."""

from __future__ import annotations

from pathlib import Path

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.errors import UserError
from nft_megatron.config.schema import Config
from nft_megatron.plan.estimate import Plan, TrainPlan, check_model, make_plan
from nft_megatron.plan.layouts import cluster_of, layout_of
from nft_megatron.plan.memory import FIT, UPDATE_FIT
from nft_megatron.plan.models import find_shape
from nft_megatron.plan.report import as_json, layouts_table, report
from nft_megatron.plan.search import Search, search
from nft_megatron.plan.storage import check_host
from nft_megatron.plan.workload import Assumptions


def plan_run(
    config: Config,
    assumptions: Assumptions | None = None,
    *,
    gpus: int | None = None,
    kind: str | None = None,
    with_layouts: bool = False,
    json_path: Path | None = None,
) -> Plan:
    """Print the plan of ``config`` and, on request, all layouts that fit; write both to ``json_path``. Returns the plan.

    Raises:
        UserError: if the run is impossible as configured, after printing the plan.
    """
    assumptions = assumptions or Assumptions()
    shape, source = find_shape(config.model.path)
    cluster = cluster_of(config, gpus, kind)
    check_model(config, shape)
    found = search(config, shape, cluster, assumptions) if with_layouts else None
    try:
        plan = make_plan(config, shape, cluster, layout_of(config, cluster), assumptions)
    except UserError:
        if found:
            print(layouts_table(found))
        raise
    print(report(plan, source))
    if found:
        print("\n" + layouts_table(found))
    if json_path:
        with atomic_file(json_path) as temporary:
            temporary.write_text(as_json(plan, found))
    if not plan.training.fits:
        raise _too_large(plan.training, found or search(config, shape, cluster, assumptions))
    check_host(config, plan.host)
    return plan


def _too_large(plan: TrainPlan, found: Search) -> UserError:
    fullest, gpu = max(plan.stages, key=lambda stage: stage.demand), plan.cluster.gpu
    if found.fitting:
        best = found.fitting[0]
        layout = best.layout
        remedy = (
            f"the fastest layout that fits, with {best.peak / 1e9:.1f} GB: parallel.tensor={layout.tensor} "
            f"parallel.pipeline={layout.pipeline} parallel.virtual_pipeline={layout.virtual_pipeline} "
            f"parallel.context={layout.context} "
            + (f"parallel.expert={layout.expert} " if layout.expert > 1 else "")
            + ("parallel.first_stage_layers=null " if plan.layout.first_stage_layers else "")
            + ("parallel.last_stage_layers=null " if plan.layout.last_stage_layers else "")
            + f"model.recompute={layout.recompute}; --layouts lists others"
        )
    else:
        remedy = f"no layout fits, the smallest needs {found.smallest / 1e9:.1f} GB: use more GPUs or shorter packs"
    share, need, when = FIT, fullest.passes, ""
    if need <= share * gpu.memory:
        share, need, when = UPDATE_FIT, fullest.update, " in the update"
    problem = (
        f"stage {fullest.stage} needs {need / 1e9:.1f} GB{when}; {share:.0%} of {gpu.name} is {share * gpu.memory / 1e9:.1f} GB"
    )
    return UserError("parallel", plan.layout, problem, remedy)
