"""The client's commands that submit and show: submit, jobs, stats, watch. All of them speak HTTP only."""

import json
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.text import Text

from halfstep.service.cli.live import view_for
from halfstep.service.cli.options import AsJson, IdempotencyKey, JobId, Key, Url
from halfstep.service.cli.render import (
    Terminal,
    event_line,
    jobs_table,
    number,
    print_wide,
    series_table,
    stats_table,
)
from halfstep.service.cli.specfile import read_spec
from halfstep.service.client.http import Api
from halfstep.service.client.watching import all_events, follow
from halfstep.service.contract.events import EventType
from halfstep.service.contract.states import JobState

SeriesName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="As the list has it: held_out/loss.", show_default=False)
]
SpecFile = Annotated[
    str, typer.Argument(metavar="FILE", help="The job as YAML or JSON; - reads standard input.")
]
Follow = Annotated[
    bool, typer.Option("--watch", "-w", help="Show progress, and leave with the job's outcome.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Have it checked and completed, and store nothing.")]
States = Annotated[
    list[JobState] | None, typer.Option(help="Only these states; repeatable.", show_default=False)
]
Tags = Annotated[
    list[str] | None, typer.Option(help="Only with this tag (key:value); repeatable.", show_default=False)
]
FollowOn = Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, until interrupted.")]
Kinds = Annotated[
    list[str] | None,
    typer.Option(
        "--type", help=f"Only these: {', '.join(get_args(EventType))}; repeatable.", show_default=False
    ),
]
After = Annotated[
    str | None,
    typer.Option(
        help="Begin after this cursor of the API, or with `latest` from now on.",
        show_default=False,
    ),
]

INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the commands to the tree."""
    for command in (submit, jobs, stats, watch, events, series):
        app.command()(command)


def submit(
    file: SpecFile,
    follow_it: Follow = False,
    dry_run: DryRun = False,
    idempotency_key: IdempotencyKey = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job."""
    spec = read_spec(file)
    console = _console()
    with Api(url, key) as api:
        if dry_run:
            _dry_run(api, spec, console, as_json=as_json)
            return
        job = api.submit(spec, idempotency_key=idempotency_key)
        if follow_it:
            if not as_json:
                console.print(Text.assemble("submitted ", (str(job["id"]), "bold")))
            _watch(api, str(job["id"]), console, as_json=as_json)
        elif as_json:
            print(json.dumps(job))
        else:
            print(job["id"])
            Terminal(stderr=True).print(f"halfstep watch {job['id']}", style="dim", soft_wrap=True)


def jobs(
    state: States = None,
    name: Annotated[str | None, typer.Option(help="Only this name.", show_default=False)] = None,
    tag: Tags = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20,
    url: Url = None, key: Key = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """List jobs, newest first."""
    with Api(url, key) as api:
        page = api.list_jobs(states=[each.value for each in state or ()], name=name, tags=tag, limit=limit)
    if as_json:
        print(json.dumps(page))
        return
    console = _console()
    if not page["items"]:
        console.print("no jobs", style="dim")
        return
    print_wide(jobs_table(page["items"]))
    if page.get("next_cursor"):
        console.print(
            f"… and older ones (--limit, at most 100; this shows {len(page['items'])})", style="dim"
        )


def stats(job_id: JobId, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Show a job's statistics."""
    with Api(url, key) as api:
        job_id = api.resolve(job_id)
        document = api.stats(job_id)
        if as_json:
            print(json.dumps(document))
            return
        _console().print(stats_table(document, api.job(job_id)))


def watch(job_id: JobId, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Follow a job until it ends; the exit code is 0 only if it succeeded."""
    with Api(url, key) as api:
        _watch(api, api.resolve(job_id), _console(), as_json=as_json)


def events(
    follow_on: FollowOn = False,
    kinds: Kinds = None,
    after: After = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show what happened to all jobs, in order, and who did it."""
    console, errors = _console(), Terminal(stderr=True)

    def away(why: str) -> None:
        errors.print(f"waiting: {why}", style="yellow", soft_wrap=True, markup=False)

    with Api(url, key) as api:
        try:
            for event in all_events(api, types=kinds or (), after=after, follow_on=follow_on, away=away):
                if as_json:
                    print(json.dumps(event), flush=True)
                else:
                    console.print(event_line(event), soft_wrap=True)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def series(
    job_id: JobId, name: SeriesName = None, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Show a job's series, such as its held-out loss, or the points of one."""
    with Api(url, key) as api:
        job_id = api.resolve(job_id)
        if name is None:
            found = api.list_series(job_id)
            if as_json:
                print(json.dumps(found.document()))
            elif found.items:
                print_wide(series_table(found.items))
            else:
                _console().print("no series yet", style="dim")
            return
        for page in api.series(job_id, name):
            if as_json:
                print(json.dumps(page.document()))
                continue
            for step, value in zip(page.columns["step"], page.columns["value"], strict=True):
                print(f"{step}\t{number(value, 9)}")


def _console() -> Terminal:
    return Terminal()


def _dry_run(api: Api, spec: dict[str, Any], console: Console, *, as_json: bool) -> None:
    answer = api.dry_run(spec)
    if as_json:
        print(json.dumps(answer))
        return
    workers = answer.get("capable_workers")
    console.print(f"valid; live workers that could run it: {workers}", soft_wrap=True)
    for warning in answer.get("warnings") or ():
        console.print(Text.assemble(("warning: ", "yellow"), str(warning)), soft_wrap=True)


def _watch(api: Api, job_id: str, console: Console, *, as_json: bool) -> None:
    try:
        final, job = follow(api, job_id, view_for(console, as_json=as_json))
    except KeyboardInterrupt:
        if not as_json:
            console.print(
                f"no longer watching; the job goes on (halfstep cancel {job_id} stops it)", soft_wrap=True
            )
        raise typer.Exit(INTERRUPTED) from None
    if not as_json:
        console.print()
        console.print(stats_table(final, job))
    if final.get("state") != JobState.SUCCEEDED:
        raise typer.Exit(1)
