"""One file of routes per resource: from the request to a store function and back, and nothing else."""
