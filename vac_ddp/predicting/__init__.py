"""Prediction of a data set: what is scored, part files, resume."""
