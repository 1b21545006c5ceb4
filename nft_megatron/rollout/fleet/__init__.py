"""The fleet: vLLM servers that generate answers, kept alive and on the current weights."""
