"""What every room may use: records, errors, the run folder's paths, atomic writes. Imports no torch."""
