"""The span audit: which tokens of a task's examples count as correctness, and what looks wrong with them."""
