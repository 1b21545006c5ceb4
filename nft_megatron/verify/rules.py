"""The version of the rules by which answers are judged.

It is part of every verdict and so of every row of a ledger. tests/verify/test_rules.py has a fingerprint of a table of verdicts
for each version: if a verdict changes, the version must.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from nft_megatron.verify.modes import mode_of


def rules_of(mode: str) -> str:
    """The rules of a mode: the version of its own, and that of math-verify where it compares by that. Of a user's function: its
    import path and a hash of its source; of a service: its URL.

    >>> rules_of("dapo").partition("/")[0], len(rules_of("strict").split())
    ('dapo', 2)
    """
    own = mode_of(mode)
    uses_math_verify = own.judge in ("strict", "math-verify")
    library = f"math-verify/{importlib.metadata.version('math-verify')}" if uses_math_verify else ""
    return f"{own.version} {library}".strip()


def other_rules(verifiers: Iterable[str], mode: str) -> str | None:
    """The rules, other than those of ``mode``, that judged answers whose verdicts name ``verifiers``; None if there are none.

    A verdict that needed no comparison names only a part of the rules.

    >>> other_rules(["dapo/1", "none"], "dapo"), other_rules(["strict/0 math-verify/0.1"], "strict")
    ('dapo/1', 'strict/0 math-verify/0.1')
    """
    parts = {part: None for verifier in verifiers if verifier != "none" for part in verifier.split()}
    return " ".join(parts) if parts.keys() - set(rules_of(mode).split()) else None
