"""Embed: `vac embed ...`, or `torchrun ... -m vac_ddp.embed`: features of a frozen encoder."""
