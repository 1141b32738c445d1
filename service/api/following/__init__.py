"""Following what changes: waiting for a change, summaries kept per change, feeds and event streams."""
