"""The worker's parent process: it claims jobs, watches their processes and concludes. No torch here."""
