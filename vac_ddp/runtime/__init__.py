"""Processes: ranks, signals, locks, exit statuses."""
