"""What the rest of the program sees of a server."""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.rollout.fleet.health import Health


@dataclass(frozen=True)
class Member:
    """A snapshot of a server, not a handle to it.

    ``weight_version``: what it serves, -1 before its first weights. ``incarnation`` counts its starts; reports about an earlier
    one are ignored. Every request carries ``api_key`` as a bearer token.

    >>> member = Member("local-0", "http://127.0.0.1:8000", "secret", Health(), weight_version=-1, incarnation=1)
    >>> member.headers
    {'Authorization': 'Bearer secret'}
    """

    name: str
    url: str
    api_key: str
    health: Health
    weight_version: int
    incarnation: int

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every HTTP request to it."""
        return {"Authorization": f"Bearer {self.api_key}"}

    def __repr__(self) -> str:
        return f"Member({self.name}, {self.url}, {self.health.state.value}, version {self.weight_version})"
