"""What kinds of things are told of a job, and how grave each may be."""

from typing import Literal

EventType = Literal[
    "state", "precision", "overflow", "nan", "alert", "evaluation", "checkpoint", "worker", "warning"
]
Level = Literal["debug", "info", "warning", "error"]
