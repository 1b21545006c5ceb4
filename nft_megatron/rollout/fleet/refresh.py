"""How one server switches to a version, in the order that vLLM 0.32.0 turned out to need.

Pause; update; compare the fingerprint; reset the prefix cache; resume; check the canary; only then assign work. A paused server
answers no requests, so after a failure anywhere it serves nobody until good weights arrive.
"""

from __future__ import annotations

import math

from nft_megatron.base.deadline import Deadline
from nft_megatron.rollout.fleet.control import Control, InFlight
from nft_megatron.rollout.fleet.session import excerpt
from nft_megatron.rollout.fleet.versions import Published

_CANARY_NATS = 0.25
"""Largest mean difference between two servers' canaries. In bfloat16, kernels and batches differ by a few hundredths of a nat,
wrong weights by whole nats."""


class WrongWeights(RuntimeError):
    """A server loaded weights other than those it was given, or computes something else with them than other servers do."""


def load_folder(control: Control, published: Published, in_flight: InFlight, deadline: Deadline) -> None:
    """Make a server read the version's files. It stays paused; call :func:`verify_and_resume` next."""
    assert published.folder is not None
    control.pause(in_flight, deadline.left)
    control.start_update(deadline.left)
    control.update({"folder": str(published.folder)}, deadline.left)
    control.finish_update(published.version, deadline.left)


def verify_and_resume(
    control: Control, published: Published, vocab_size: int, check_model: bool, deadline: Deadline
) -> list[float]:
    """Resume a paused server if it holds ``published``, and return its canary.

    ``check_model``: compare not only what arrived but also what the model now holds, as far as its layout can be undone; worth
    doing once per process.

    Raises ``WrongWeights``, or ``ControlError`` if the server does not answer; it is then still paused, or must not get work.
    """
    fingerprints = control.fingerprints(deadline.left)
    if set(fingerprints) != {published.fingerprint}:
        raise WrongWeights(f"{control.url} loaded weights {excerpt(', '.join(fingerprints))}, not {published.fingerprint}")
    if check_model and (wrong := control.wrong_tensors(deadline.left)):
        names = excerpt(", ".join(wrong[:5]))
        raise WrongWeights(f"{control.url} holds values it was not given in {len(wrong)} tensors: {names}")
    if control.version(deadline.left) != published.version:
        raise WrongWeights(f"{control.url} does not report version {published.version}")
    control.reset_prefix_cache()
    control.resume()
    canary = control.canary(vocab_size, deadline.left)
    if not all(math.isfinite(value) and value <= 0 for value in canary):
        raise WrongWeights(f"{control.url} has log-probs {canary} after version {published.version}")
    return canary


def compare_canaries(url: str, canary: list[float], expected: list[float]) -> None:
    """Raise ``WrongWeights`` if a server's canary differs from that of another server with the same version.

    >>> compare_canaries("a", [-1.0, -2.0], [-1.02, -1.99])
    """
    gap = sum(abs(a - b) for a, b in zip(canary, expected, strict=True)) / len(canary)
    if gap > _CANARY_NATS:
        raise WrongWeights(f"{url}: log-probs differ by {gap:.2f} nats from those of another server with the same version")
