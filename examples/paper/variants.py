"""What is compared: the six algorithms of Table 1, ω as in Figure 9, ε as in Figure 10."""

from __future__ import annotations

ALGORITHMS = {
    "NFT": ("algorithm.name=nft",),
    "RFT": ("algorithm.name=rft",),
    "GRPO": ("algorithm.name=grpo",),
    "Dr. GRPO": ("algorithm.name=dr_grpo",),
    "DAPO": ("algorithm.name=dapo",),
    "Iterative DPO": ("algorithm.name=infonca",),
}
OMEGA = {
    "ω = 1": ("algorithm.prompt_weight=one",),
    "ω = 1 − r̂": ALGORITHMS["NFT"],
    "ω = √((1 − r̂)/r̂)": ("algorithm.prompt_weight=sqrt_odds",),
}
EPSILON = {
    "ε = 1": ALGORITHMS["NFT"],
    "ε = 0.5": ("algorithm.epsilon=0.5",),
    "ε = 0.1": ("algorithm.epsilon=0.1",),
    "ε = 0.001": ("algorithm.epsilon=0.001",),
}
UNFILTERED = ("GRPO", "Dr. GRPO")
"""They ask fewer questions a step, as none is left out, and get twice the steps; all are compared after equal samples."""


def folder_name(overrides: tuple[str, ...]) -> str:
    """Of the run with these overrides: equal ones share it.

    >>> folder_name(("algorithm.name=nft",)), folder_name(("algorithm.epsilon=0.1",))
    ('nft', 'epsilon-0.1')
    """
    words = [
        word.split(".", 1)[1].replace("name=", "").replace("=", "-") for word in overrides if word.startswith("algorithm.")
    ]
    return "_".join(words)
