"""The store: one SQL database holds the truth about jobs, their record, workers, components and keys.

Functions take a `Session` first and never commit: the caller's transaction is the unit. No HTTP,
no Celery and no torch here.
"""
