"""Training runs: from settings to the best weights, safe to interrupt."""
