"""Where the bytes of checkpoints live: the data directory, and a remote store behind it. No SQL here."""
