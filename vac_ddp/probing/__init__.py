"""Probes: small classifiers on the features of a frozen encoder, selected by nested cross-validation."""
