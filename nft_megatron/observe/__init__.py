"""What a person sees of a run: metrics, progress, plots, the report."""
