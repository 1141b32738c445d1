"""A checkpoint's weights to a file: in pieces, resumed where it was cut off, there only when it is right."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from halfstep.service.client.http import Api, ServerUnreachable
from halfstep.service.errors import HalfstepError


class DownloadFailed(HalfstepError):
    """The file could not be written, or its bytes are not those that were saved."""

    code = "download_failed"


def fetch(
    api: Api,
    job_id: str,
    step: int,
    sha256: str,
    target: Path,
    *,
    replace: bool,
    on_progress: Callable[[int, int], object],
) -> None:
    """Download the weights of a checkpoint to `target`.

    What has arrived is kept beside it under a name that carries the sha256, so that asking again goes on.

    Raises:
        DownloadFailed: `target` is there already, the disk refused, the connection broke, or the bytes are
            wrong.
        ServerRefused: with the server's reason.
    """
    if target.exists() and not replace:
        raise DownloadFailed(f"{target} is there already; --force replaces it, --output names another")
    part = target.with_name(f"{target.name}.{sha256[:16]}.part")
    try:
        had = part.stat().st_size if part.exists() else 0
        with (
            api.model(job_id, step, sha256, start=had) as (start, total, pieces),
            part.open("r+b" if start else "wb") as file,
        ):
            file.truncate(start)
            file.seek(start)
            done = start
            for piece in pieces:
                file.write(piece)
                done += len(piece)
                on_progress(done, total)
        if _sha256(part) != sha256:
            part.unlink()
            raise DownloadFailed(
                "the bytes that arrived are not those that were saved; try again, or take another checkpoint"
            )
        part.replace(target)
    except ServerUnreachable as error:
        raise DownloadFailed(f"{error}; the same command goes on where it stopped") from error
    except OSError as error:
        raise DownloadFailed(f"{target} cannot be written: {error.strerror or error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
