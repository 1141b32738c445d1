"""The HTTP API: routes over store functions. No SQL, no torch, no training here."""

from halfstep.service.api.app import create_app

__all__ = ["create_app"]
