"""Lines 5-11 of Algorithm 1: generate, grade, filter, write the step's ledger."""
