"""Arguments that several programs share, and how a mistake in them is said."""
