"""Entry point of `python -m halfstep.service.dispatch`; ends cleanly on SIGTERM and SIGINT."""

import signal
import sys
import threading
from types import FrameType

import structlog
from pydantic import ValidationError

from halfstep.service.dispatch.loop import run
from halfstep.service.errors import HalfstepError
from halfstep.service.logs import configure
from halfstep.service.settings import Settings

log = structlog.get_logger(__name__)


def main() -> None:
    """Run the dispatcher until it is told to stop."""
    try:
        settings = Settings()
    except (ValidationError, ValueError) as error:
        sys.exit(f"halfstep dispatch: {error}")
    configure(settings, "dispatch")
    stop = threading.Event()

    def on_signal(_: int, __: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        run(settings, stop)
    except HalfstepError as error:
        sys.exit(f"halfstep dispatch: {error}")
    log.info("dispatcher stopped")


if __name__ == "__main__":
    main()
