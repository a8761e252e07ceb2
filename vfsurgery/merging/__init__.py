"""One merge: its arguments, the work from traced sources to the result, shares, zeros, choices, budgets."""
