"""Algorithm 1 of the paper: collect verified answers, train on them, continue with the trained policy."""

from __future__ import annotations

from nft_megatron.base.output import outlive_output
from nft_megatron.config.schema import Config
from nft_megatron.lifecycle.heartbeat import alive
from nft_megatron.run.build import build_run


def train(config: Config) -> None:
    """Train until ``config.train.num_steps``, from the newest checkpoint in ``config.run_dir`` if it has one.

    Called by every rank. Steps are numbered from 1: step k collects with the weights of version k − 1 and leaves version k.

    Raises :class:`~nft_megatron.base.errors.StoppedEarly` after a stop request, with everything saved.
    """
    outlive_output()
    with alive(config), build_run(config) as run:
        for step in range(run.step + 1, config.train.num_steps + 1):
            dataset = run.collect(step)  # lines 5-11: generate, verify, filter, write the ledger
            batch = run.prepare(dataset, step)  # balance over dp, pack, old log-probs
            with run.phase("update", total=len(batch.minibatches)):
                updates = []
                for minibatch in batch.minibatches:
                    updates.append(run.update(minibatch))  # lines 13-20
            run.publish(version=step)  # π ← π_θ⁺
            run.after_step(step, dataset, batch, updates)
        run.finish()
