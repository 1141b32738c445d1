"""What benchmarks share: databases, an installation, a load, rows to store, and the report of each."""
