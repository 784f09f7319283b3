"""One optimizer step, the epochs around it, and what makes them safe to interrupt."""
