"""What the rest of the program sees of a server."""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.rollout.fleet.access import Credentials
from nft_megatron.rollout.fleet.health import Health


@dataclass(frozen=True)
class Member:
    """A snapshot of a server, not a handle to it.

    ``weight_version``: what it serves, -1 before its first weights. ``incarnation`` counts its starts; reports about an earlier
    one are ignored. ``server_id`` names the start of a server of the run, which must prove itself; None: someone else's.

    >>> member = Member("url-0", "http://127.0.0.1:8000", "secret", Health(), weight_version=-1, incarnation=1)
    >>> member.credentials.authorize("GET", "/health")
    ('Bearer secret', None)
    """

    name: str
    url: str
    api_key: str
    health: Health
    weight_version: int
    incarnation: int
    server_id: str | None = None

    @property
    def credentials(self) -> Credentials:
        """How requests to it are authorised."""
        return Credentials(self.api_key, self.server_id)

    def __repr__(self) -> str:
        return f"Member({self.name}, {self.url}, {self.health.state.value}, version {self.weight_version})"
