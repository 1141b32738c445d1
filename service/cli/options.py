"""Arguments and options that several of the client's commands share."""

from typing import Annotated

import typer

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
IdempotencyKey = Annotated[
    str | None, typer.Option(help="The same key and job again give the same job.", show_default=False)
]
