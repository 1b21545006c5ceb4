"""Assembling and running a training run: joining the ranks, building, checkpoints, weight sync, replay."""
