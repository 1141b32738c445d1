"""The command tree and its edge: expected errors become one readable message and an exit code.

Exit codes: 0 done (for a watched job: it succeeded), 1 refused, failed or unreachable, 2 wrong usage,
130 interrupted.
"""

import importlib
import sys
from typing import NoReturn

import typer
from pydantic import ValidationError

from halfstep.service.cli.render import Terminal, problem
from halfstep.service.client.http import ServerRefused
from halfstep.service.errors import HalfstepError

# Who owns which command. Only the owner of the one that is asked for is imported: `halfstep stats` need not
# wait for SQLAlchemy and Alembic.
OWNERS = {
    "halfstep.service.cli.parts": ("up", "api", "worker", "dispatch", "migrate", "restored", "openapi"),
    "halfstep.service.cli.jobs": ("submit", "jobs", "stats", "watch", "events", "series"),
    "halfstep.service.cli.control": ("cancel", "pause", "resume", "retry", "checkpoints", "download"),
    "halfstep.service.cli.keys": ("keys",),
    "halfstep.service.cli.health": ("health",),
}


def command_tree(first: str | None = None) -> typer.Typer:
    """The whole tree, or no more of it than the command `first` needs."""
    app = typer.Typer(
        name="halfstep",
        help="Mixed-precision training as a service: start it, submit jobs, watch every step.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    owners = [module for module, commands in OWNERS.items() if first in commands] or list(OWNERS)
    for module in owners:
        importlib.import_module(module).register(app)

    @app.callback()
    def _root() -> None:
        """Keep the commands' names even where the tree holds a single one."""

    return app


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    errors = Terminal(stderr=True)
    try:
        command_tree(sys.argv[1] if len(sys.argv) > 1 else None)()
    except ServerRefused as error:
        errors.print(problem(error), soft_wrap=True)
    except HalfstepError as error:
        errors.print(f"[bold red]error:[/] {_plain(str(error))}", soft_wrap=True)
    except ValidationError as error:
        for each in error.errors(include_url=False, include_input=False, include_context=False):
            setting = "_".join(str(place) for place in each["loc"]).upper()
            message = each["msg"].removeprefix("Value error, ")
            text = f"HALFSTEP_{setting}: {message}" if setting else message
            errors.print(f"[bold red]error:[/] {_plain(text)}", soft_wrap=True)
    except ValueError as error:
        # Settings raise it for a HALFSTEP_…_FILE that cannot be read; anything else is a defect.
        if not str(error).startswith("HALFSTEP_"):
            raise
        errors.print(f"[bold red]error:[/] {_plain(str(error))}", soft_wrap=True)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left: nothing more to say to anybody
    sys.exit(1)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
