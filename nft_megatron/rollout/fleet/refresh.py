"""How one server takes over a version: the order that vLLM 0.32.0 turned out to need.

Pause; update; compare the fingerprint; forget the prefix cache; resume; canary; only then it is given work. A paused server
answers nothing, so a failure anywhere leaves one that serves nobody until good weights arrive.
"""

from __future__ import annotations

import math

from nft_megatron.base.deadline import Deadline
from nft_megatron.rollout.fleet.control import Control, InFlight
from nft_megatron.rollout.fleet.versions import Published

_CANARY_NATS = 0.25
"""Largest mean difference of two servers' canaries: kernels and batches differ by some hundredths in bfloat16, wrong weights
by whole nats."""


class WrongWeights(RuntimeError):
    """A server took over other weights than those it was given, or they don't work as on the other servers."""


def load_folder(control: Control, published: Published, in_flight: InFlight, deadline: Deadline) -> None:
    """Make a server read the version's files. It is paused afterwards; :func:`verify_and_resume` follows."""
    assert published.folder is not None
    control.pause(in_flight, deadline.left)
    control.start_update(deadline.left)
    control.update({"folder": str(published.folder)}, deadline.left)
    control.finish_update(published.version, deadline.left)


def verify_and_resume(
    control: Control, published: Published, vocab_size: int, check_model: bool, deadline: Deadline
) -> list[float]:
    """Let a paused server serve if it holds ``published``, and return its canary.

    ``check_model``: compare not only what arrived but what the model holds now, as far as its layout can be undone; worth doing
    once for every process.

    Raises ``WrongWeights``, or ``ControlError`` where it does not answer; it is then still paused, or must not be given work.
    """
    fingerprints = control.fingerprints(deadline.left)
    if set(fingerprints) != {published.fingerprint}:
        raise WrongWeights(f"{control.url} took over weights {', '.join(fingerprints)}, not {published.fingerprint}")
    if check_model and (wrong := control.wrong_tensors(deadline.left)):
        raise WrongWeights(f"{control.url} holds other values than it was given in {', '.join(wrong[:5])} ({len(wrong)})")
    if control.version(deadline.left) != published.version:
        raise WrongWeights(f"{control.url} did not take the number of version {published.version}")
    control.reset_prefix_cache()
    control.resume()
    canary = control.canary(vocab_size, deadline.left)
    if not all(math.isfinite(value) and value <= 0 for value in canary):
        raise WrongWeights(f"{control.url} has log-probs {canary} after version {published.version}")
    return canary


def compare_canaries(url: str, canary: list[float], expected: list[float]) -> None:
    """Raise ``WrongWeights`` where a server's canary is not that of another with the same version.

    >>> compare_canaries("a", [-1.0, -2.0], [-1.02, -1.99])
    """
    gap = sum(abs(a - b) for a, b in zip(canary, expected, strict=True)) / len(canary)
    if gap > _CANARY_NATS:
        raise WrongWeights(f"{url}: log-probs differ by {gap:.2f} nats from another server's of the same version")
