"""Arguments and options that several of the client's commands share."""

import re
from typing import Annotated

import typer

from halfstep.service.contract.text import IDEMPOTENCY_KEY

Url = Annotated[
    str | None, typer.Option("--url", help="Address of the service. [env: HALFSTEP_URL]", show_default=False)
]
Key = Annotated[
    str | None, typer.Option("--key", help="API key (tk_…). [env: HALFSTEP_API_KEY]", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="The service's own documents, for programs.")]
JobId = Annotated[
    str, typer.Argument(metavar="ID", help="A job's id, or enough of its beginning to be the only one.")
]


def _sendable(key: str | None) -> str | None:
    if key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        raise typer.BadParameter("use 1 to 255 letters, digits and signs of ASCII, without blanks")
    return key


IdempotencyKey = Annotated[
    str | None,
    typer.Option(
        help="The same key and job again give the same job.", show_default=False, callback=_sendable
    ),
]
