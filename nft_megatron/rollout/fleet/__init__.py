"""A fleet of vLLM servers as one engine."""
