"""Probe: `vac probe ...`, or `torchrun ... -m vac_ddp.probe`: a classifier on frozen features, as a run."""
