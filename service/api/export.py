"""`python -m halfstep.service.api.export FILE`: write the OpenAPI document, as the repository keeps it."""

import json
import sys
import tempfile
from pathlib import Path

from halfstep.service.api.app import create_app
from halfstep.service.settings import Settings


def render() -> str:
    """The OpenAPI document as text, the same on every machine. Touches no database."""
    settings = Settings(data_dir=Path(tempfile.gettempdir()), database_url="sqlite:////nowhere.db")
    return json.dumps(create_app(settings).openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
