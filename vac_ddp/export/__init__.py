"""A run's best model as files that others load."""
