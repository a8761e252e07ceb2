"""Statistics of activations: small accumulators, and one pass over the data that fills them all."""
