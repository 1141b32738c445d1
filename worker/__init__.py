"""The worker: training engine, training loop, and the Celery process that runs jobs."""
