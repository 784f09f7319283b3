"""Views of videos to logits."""
