"""What a run tells people: console, JSON lines, W&B, HTML."""
