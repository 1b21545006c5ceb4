"""A training run put together: joining the ranks, building, checkpoints, weight sync, replay."""
