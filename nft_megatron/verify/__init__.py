"""Right, wrong or unknown: grading of answers."""
