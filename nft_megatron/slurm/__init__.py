"""Slurm: what is submitted, what conducts a job from its first node, and what tells people how it goes. No torch here."""
