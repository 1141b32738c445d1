"""The `halfstep` command: runs the parts of the service, and speaks to a running one over HTTP.

Nothing here decides what a job is or does: the client commands know the HTTP contract only, and the
parts are started as processes of their own.
"""

from halfstep.service.cli.app import main

__all__ = ["main"]
