"""Logits files and what follows from them: averages, figures, submissions. numpy only."""
