"""Reports as values, and which report belongs to which model."""
