"""What a run tells people: terminal, log, services, report.html."""
