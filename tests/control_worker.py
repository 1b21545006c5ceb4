"""What tests/model/test_control.py runs in two processes: rank 1 comes late, or not at all until rank 0 has given it up."""

import dataclasses
import datetime
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist
from waiting import until

from nft_megatron.batching.batch import StepPlan
from nft_megatron.model import control
from nft_megatron.model.shared_reading import _exchange
from nft_megatron.model.topology import Topology, init_topology, shutdown


def give_up(folder: Path, seconds: float) -> dict[str, str]:
    """What rank 0 says of a rank 1 that takes no part, by collective; it waits ``seconds``, in vain."""
    topology = init_topology(threads=1, timeout_seconds=240, control_timeout_seconds=240)
    waits = {
        "on_main": lambda place: control.on_main(place, lambda: 1),
        "first_of": lambda place: control.first_of(place, None),
        "together": lambda place: control.together(place, lambda: None, is_short=True),
        "exchange": lambda place: _exchange(place, _NO_PLAN, np.empty(0), {}),
    }
    said = {}
    for name, wait in waits.items():
        place, done = _with_new_groups(topology, seconds), folder / name
        if topology.is_main:
            try:
                wait(place)
            except RuntimeError as error:
                said[name] = str(error)
            done.touch()
        else:
            until(done.exists)
        dist.barrier()
    del place, topology
    shutdown()
    return said


def come_late(seconds: float) -> list[int]:
    """What each rank gets of a rank 0 that works for longer than the ``seconds`` of a collective."""
    topology = init_topology(threads=1, timeout_seconds=240, control_timeout_seconds=240)
    place = _with_new_groups(topology, seconds)

    def action() -> int:
        time.sleep(1.2 * seconds)
        return 17

    found = control.on_main(place, action)
    of_ranks: list[int] = [0] * topology.world_size
    dist.all_gather_object(of_ranks, found)
    del place, topology
    shutdown()
    return of_ranks


_NO_PLAN: StepPlan = None  # type: ignore[assignment]
"""The exchange begins with a collective, before it looks at the plan."""


def _with_new_groups(topology: Topology, seconds: float) -> Topology:
    timeout = datetime.timedelta(seconds=seconds)
    host, control_group = (dist.new_group(backend="gloo", timeout=each) for each in (timeout, datetime.timedelta(seconds=600)))
    return dataclasses.replace(topology, host_group=host, control_group=control_group, timeout=timeout)
