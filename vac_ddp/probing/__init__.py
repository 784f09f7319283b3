"""Probes: small classifiers on the features of a frozen encoder."""
