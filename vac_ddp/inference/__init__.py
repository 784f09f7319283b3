"""Views of a video, their logits, scores and submissions."""
