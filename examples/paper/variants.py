"""What is compared (the six algorithms of Table 1, ω as in Figure 9, ε as in Figure 10, the weight of wrong answers), and
what the paper found.
"""

from __future__ import annotations

from typing import NamedTuple

from statistics_of_runs import Kind

ALGORITHMS = {
    "NFT": ("algorithm.name=nft",),
    "RFT": ("algorithm.name=rft",),
    "GRPO": ("algorithm.name=grpo",),
    "Dr. GRPO": ("algorithm.name=dr_grpo",),
    "DAPO": ("algorithm.name=dapo",),
    "Iterative DPO": ("algorithm.name=infonca",),
}
OMEGA = {
    "ω = 1 − r̂": ALGORITHMS["NFT"],
    "ω = √((1 − r̂)/r̂)": ("algorithm.prompt_weight=sqrt_odds",),
    "ω = 1": ("algorithm.prompt_weight=one",),
}
EPSILON = {
    "ε = 1": ALGORITHMS["NFT"],
    "ε = 0.5": ("algorithm.epsilon=0.5",),
    "ε = 0.1": ("algorithm.epsilon=0.1",),
    "ε = 0.001": ("algorithm.epsilon=0.001",),
}
WEIGHT = {
    "weight 1": ALGORITHMS["NFT"],
    "weight 0.5": ("algorithm.negative_weight=0.5",),
    "weight 0": ("algorithm.negative_weight=0",),
}
"""Of wrong answers. 0 is RFT with NFT's ω; the authors' scripts suggest 0.5 for their largest model."""
UNFILTERED = ("GRPO", "Dr. GRPO")
"""These use fewer questions per step, because none is left out, and get twice the steps; all are compared at equal samples."""


class Finding(NamedTuple):
    """``quantity`` of ``left`` less that of ``right``, or its change since the start without a ``right``, is ``kind`` zero."""

    claim: str
    quantity: str
    left: str
    right: str | None
    kind: Kind


FINDINGS = (
    Finding("NFT beats RFT", "accuracy", "NFT", "RFT", "above"),
    Finding("NFT is at least as good as GRPO", "accuracy", "NFT", "GRPO", "at least"),
    Finding("… as Dr. GRPO", "accuracy", "NFT", "Dr. GRPO", "at least"),
    Finding("… as Iterative DPO", "accuracy", "NFT", "Iterative DPO", "at least"),
    Finding("NFT and DAPO are about equal", "accuracy", "NFT", "DAPO", "about"),
    Finding("RFT's entropy is below NFT's", "entropy", "RFT", "NFT", "below"),
    Finding("RFT's entropy falls", "entropy", "RFT", None, "below"),
    Finding("NFT's entropy rises", "entropy", "NFT", None, "above"),
    Finding("DAPO's entropy rises", "entropy", "DAPO", None, "above"),
    Finding("ω = 1 − r̂ beats ω = 1", "accuracy", "ω = 1 − r̂", "ω = 1", "above"),
    Finding("ω = √((1 − r̂)/r̂) beats ω = 1", "accuracy", "ω = √((1 − r̂)/r̂)", "ω = 1", "above"),
    Finding("these two are about equal", "accuracy", "ω = 1 − r̂", "ω = √((1 − r̂)/r̂)", "about"),
    Finding("ε = 1 beats a small ε", "accuracy", "ε = 1", "ε = 0.1", "above"),
    Finding("… and a smaller one", "accuracy", "ε = 1", "ε = 0.001", "above"),
)


def folder_name(overrides: tuple[str, ...]) -> str:
    """The folder name of the run with these overrides; equal ones share it.

    >>> folder_name(("algorithm.name=nft",)), folder_name(("algorithm.epsilon=0.1",))
    ('nft', 'epsilon-0.1')
    """
    words = [
        word.split(".", 1)[1].replace("name=", "").replace("=", "-") for word in overrides if word.startswith("algorithm.")
    ]
    return "_".join(words)
