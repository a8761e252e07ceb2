"""What a model is worth and why: accuracy, barriers, flips, vanishing features, and what to do about them."""
