"""The fleet's metrics in a step's row: totals under ``fleet/``, each server's share under ``server/<name>/``."""

from __future__ import annotations

from collections.abc import Sequence

from nft_megatron.rollout.fleet.supervisor import ServerStats
from nft_megatron.rollout.fleet.usage import FleetUsage


def fleet_metrics(usage: FleetUsage, stats: Sequence[ServerStats]) -> dict[str, float | int | list[int]]:
    """The metrics of the time that ``usage`` covers; ``stats`` describe the end of it.

    >>> from nft_megatron.rollout.fleet.usage import ServerUsage
    >>> servers = {"a": ServerUsage(tokens=100, busy_seconds=10.0), "b": ServerUsage(tokens=50, busy_seconds=5.0)}
    >>> state = ServerStats("a", "healthy", 3, num_restarts=1, sync_seconds=0.5, sync_bytes=1000, reason="")
    >>> row = fleet_metrics(FleetUsage(10.0, servers), [state])
    >>> row["fleet/tokens_per_second"], row["fleet/idle_share"], row["fleet/healthy"], row["server/b/idle_share"]
    (15.0, 0.25, 1, 0.5)
    """
    seconds, total = usage.seconds or 1.0, usage.total
    row: dict[str, float | int | list[int]] = {
        "fleet/healthy": sum(server.state == "healthy" for server in stats),
        "fleet/tokens_per_second": total.tokens / seconds,
        "fleet/idle_share": usage.idle_share,
        "fleet/wasted_tokens": total.wasted_tokens,
        "fleet/retries": total.num_retries,
        "fleet/restarts": sum(server.num_restarts for server in stats),
        "fleet/sync_seconds": max((server.sync_seconds for server in stats), default=0.0),
        "fleet/sync_bytes": max((server.sync_bytes for server in stats), default=0),
    }
    for name, server in usage.servers.items():
        row |= {
            f"server/{name}/tokens_per_second": server.tokens / seconds,
            f"server/{name}/idle_share": usage.idle_share_of(name),
            f"server/{name}/queue": server.mean_queue,
            f"server/{name}/wasted_tokens": server.wasted_tokens,
        }
    for state in stats:
        row |= {
            f"server/{state.name}/restarts": state.num_restarts,
            f"server/{state.name}/sync_seconds": state.sync_seconds,
        }
    return row
