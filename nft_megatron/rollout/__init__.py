"""Rollout: the engine protocol, the embedded engine, and the fleet of vLLM servers. The only room that talks to an engine."""
