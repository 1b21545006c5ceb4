"""Slurm: submitting jobs, running them from their first node, and reporting their status. Imports no torch."""
