"""Routes that make, show, control and delete jobs, and hand out their checkpoints."""
