"""Questions in, rollouts out: reading data sets, making prompts, the ledger."""
