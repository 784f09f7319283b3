"""Programs beside training and prediction."""
