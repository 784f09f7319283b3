"""Fine-tune video classifiers on frame folders with raw PyTorch DDP."""

__version__ = "0.1.0"
