"""The client's commands for a job that is there: cancel, pause, resume, retry, checkpoints, download."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from halfstep.service.cli.options import AsJson, IdempotencyKey, JobId, Key, Url
from halfstep.service.cli.render import Terminal, checkpoints_table, print_wide
from halfstep.service.client.downloads import fetch
from halfstep.service.client.http import Api
from halfstep.service.errors import NotFound

FromCheckpoint = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Step of one of its checkpoints to go on from; without, from the start.",
        show_default=False,
    ),
]
Step = Annotated[
    int | None,
    typer.Option(min=1, help="Of this checkpoint; without, of the newest.", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Where to; without, NAME-step-STEP.safetensors here.", show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the tree."""
    for command in (cancel, pause, resume, retry, checkpoints, download):
        app.command()(command)


def cancel(job_id: JobId, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Cancel a job; a running one stops at its next step."""
    with Api(url, key) as api:
        _show(api.cancel(api.resolve(job_id)), as_json=as_json)


def pause(job_id: JobId, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Pause a job; a running one takes a checkpoint and gives up its device."""
    with Api(url, key) as api:
        _show(api.pause(api.resolve(job_id)), as_json=as_json)


def resume(job_id: JobId, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """Send a paused job back to the queue; it goes on from its checkpoint."""
    with Api(url, key) as api:
        _show(api.resume(api.resolve(job_id)), as_json=as_json)


def retry(
    job_id: JobId,
    from_checkpoint: FromCheckpoint = None,
    idempotency_key: IdempotencyKey = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a new job like one that has ended."""
    with Api(url, key) as api:
        job = api.retry(api.resolve(job_id), from_checkpoint=from_checkpoint, idempotency_key=idempotency_key)
    _show(job, as_json=as_json)


def checkpoints(job_id: JobId, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """List what a job has saved, newest first."""
    with Api(url, key) as api:
        page = api.checkpoints(api.resolve(job_id))
    if as_json:
        print(json.dumps(page))
    elif page["items"]:
        print_wide(checkpoints_table(page["items"]))
    else:
        _console().print("no checkpoints", style="dim")


def download(
    job_id: JobId,
    step: Step = None,
    output: Output = None,
    force: Force = False,
    url: Url = None,
    key: Key = None,
) -> None:
    """Download the weights of a checkpoint as safetensors.

    A download that was cut off goes on where it stopped, and the file is there only when its sha256 is right.
    """
    with Api(url, key) as api:
        job_id = api.resolve(job_id)
        kept = api.checkpoints(job_id)["items"]
        wanted = [one for one in kept if step in (None, one["step"])]
        if not wanted:
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise NotFound(f"the job has {which}; `halfstep checkpoints {job_id}` lists those it has")
        target = output or Path(f"{job_id}-step-{wanted[0]['step']}.safetensors")
        bar = Progress(
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=Terminal(stderr=True),
            transient=True,
        )
        with bar:
            task = bar.add_task("weights", total=None)
            fetch(
                api,
                job_id,
                wanted[0]["step"],
                wanted[0]["sha256"],
                target,
                replace=force,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    print(target)


def _show(job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(job))
    else:
        _console().print(f"{job['id']} {job['state']}", soft_wrap=True)


def _console() -> Terminal:
    return Terminal()
