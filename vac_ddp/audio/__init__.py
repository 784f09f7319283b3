"""Sound of videos: spectrograms and an image model on them."""
