"""Rollout: the engine protocol, and the embedded engine that generates answers beside the trainer."""
