"""One file per command of `vac`: its arguments and what it prints."""
