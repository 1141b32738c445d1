"""`halfstep keys`: API keys, made and revoked in the database itself. A secret is shown once."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from halfstep.service.cli.render import Terminal, print_wide
from halfstep.service.errors import ConfigurationError, NotFound
from halfstep.service.settings import Settings
from halfstep.service.store.sql.database import Database, connect
from halfstep.service.store.sql.schema import check_current
from halfstep.service.store.tenants import keys as stored

app = typer.Typer(help="API keys, directly in the database.", no_args_is_help=True)

Scopes = Annotated[
    list[str] | None,
    typer.Option(
        help=f"{', '.join(stored.SCOPES)}; repeatable. Default: read and submit.", show_default=False
    ),
]
ExpiresDays = Annotated[
    float | None,
    typer.Option(
        min=0.001, max=36500, help="Useless after so many days; default: never.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def register(tree: typer.Typer) -> None:
    """Add the commands to the tree."""
    tree.add_typer(app, name="keys")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose or what for; shown in the list.")],
    tenant: Annotated[str, typer.Option(help="Jobs are seen by keys of their own tenant only.")] = "default",
    scope: Scopes = None,
    expires_days: ExpiresDays = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a key and show its secret, which nothing can show again."""
    expires_at = None if expires_days is None else time.time() + expires_days * 86400
    scopes = tuple(scope or ("read", "submit"))
    with _database() as database:
        key, secret = database.retry(
            lambda s: stored.create(s, tenant=tenant, name=name, scopes=scopes, expires_at=expires_at)
        )
    if as_json:
        print(json.dumps({**_document(key), "secret": secret}))
        return
    # The secret alone on standard output, so that it can go straight into a file or a variable.
    Terminal(stderr=True).print(
        f"key {key.id} for tenant {key.tenant}, scopes {', '.join(key.scopes)}. "
        "Keep the secret; it is not shown again:",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    print(secret)


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the keys, revoked and expired ones too."""
    with _database() as database, database.read() as session:
        keys = stored.list_keys(session, tenant)
    if as_json:
        print(json.dumps({"items": [_document(key) for key in keys]}))
        return
    console = Terminal()
    if not keys:
        console.print("no keys: the API serves this machine only", style="dim")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("id", "tenant", "name", "secret", "scopes", "state", "expires"):
        table.add_column(heading, no_wrap=True)
    for key in keys:
        table.add_row(
            key.id,
            Text(key.tenant),
            Text(key.name),
            Text(f"{key.prefix}…"),
            " ".join(key.scopes),
            _state(key),
            _when(key.expires_at) or "never",
        )
    print_wide(table)


@app.command()
def revoke(
    key_id: Annotated[
        str, typer.Argument(metavar="ID", help="A key's id, or enough of its beginning to be the only one.")
    ],
    as_json: AsJson = False,
) -> None:
    """Make a key useless from now on."""
    with _database() as database:
        with database.read() as session:
            matching = [key.id for key in stored.list_keys(session) if key.id.startswith(key_id)]
        if len(matching) != 1:
            found = "no key" if not matching else f"{len(matching)} keys"
            raise NotFound(f"{found} with an id that starts with {key_id!r}; `halfstep keys list` shows them")
        key = database.retry(lambda s: stored.revoke(s, matching[0]))
    print(json.dumps(_document(key)) if as_json else f"{key.id} revoked")


@contextmanager
def _database() -> Iterator[Database]:
    settings = Settings()
    if not settings.database_url and not settings.data_dir.is_dir():
        raise ConfigurationError(
            f"no database in {settings.data_dir}; run `halfstep migrate` first, or set HALFSTEP_DATA_DIR"
        )
    database = connect(settings)
    try:
        check_current(database)
        yield database
    finally:
        database.dispose()


def _state(key: stored.ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is not None and key.expires_at <= time.time():
        return "expired"
    return "active"


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _document(key: stored.ApiKey) -> dict[str, Any]:
    times = {name: _when(getattr(key, name)) for name in ("created_at", "expires_at", "revoked_at")}
    return {**asdict(key), **times, "state": _state(key)}
