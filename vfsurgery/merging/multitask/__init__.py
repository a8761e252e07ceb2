"""One network for several tasks: coefficients and experts that are fitted to images of each."""
