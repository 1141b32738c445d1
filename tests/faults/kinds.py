"""What the suite can do to an installation, by name, and how a run draws from it.

`injections` has a method for each kind; the points are places in the product.
"""

import random

# Every point that product code reaches; `test_points` holds that the list is complete.
POINTS = (
    "submit.before_commit",
    "submit.after_commit",
    "submit.after_enqueue",
    "dispatch.after_send",
    "reap.before_commit",
    "claim.before_commit",
    "claim.after_commit",
    "order.before",
    "order.after",
    "child.ordered",
    "opened.before_commit",
    "resume.before_commit",
    "resume.after_commit",
    "child.step",
    "report.before_commit",
    "report.after_commit",
    "checkpoint.after_write",
    "checkpoint.after_fsync",
    "checkpoint.after_rename",
    "checkpoint.before_manifest",
    "checkpoint.after_manifest",
    "checkpoint.before_reference",
    "checkpoint.after_reference",
    "checkpoint.before_removal",
    "child.before_done",
    "conclude.before",
    "conclude.before_commit",
    "conclude.after_commit",
    "drain.asked",
)

KINDS = (
    "kill worker",
    "kill child",
    "term then kill worker",
    "drain worker",
    "freeze worker",
    "freeze worker and child",
    "kill api",
    "kill api before a commit",
    "kill api after a commit",
    "kill api after a wake up",
    "kill dispatcher",
    "flush redis",
    "restart redis",
    "redis away",
    "redis away for a minute",
    "redis silent",
    "redis slow",
    "postgres silent",
    "postgres slow",
    "postgres cut",
    "postgres crash",
    "duplicate messages",
    "stale messages",
    "strange messages",
    "garbage on the queue",
    "disk full",
    "disk error",
    "truncate a checkpoint",
    "flip a bit of a checkpoint",
    "swap a checkpoint",
    "power loss",
    "hung step",
    "crash point",
    "clock an hour ahead",
    "clock an hour behind",
    "cancel what is queued",
    "cancel what starts",
    "cancel what runs",
    "cancel twice",
    "cancel what pauses",
    "cancel what is paused",
    "pause and resume",
)
DRAIN = "drain worker"
# Those that end a job's process or take it from its worker at once.
KILLS = {
    "kill worker",
    "kill child",
    "term then kill worker",
    "freeze worker",
    "freeze worker and child",
    "truncate a checkpoint",
    "flip a bit of a checkpoint",
    "swap a checkpoint",
    "power loss",
    "clock an hour ahead",
    "clock an hour behind",
}
ONCE = {"redis away for a minute", "hung step"}  # for what they cost in time


def schedule(count: int, kind: str, draw: random.Random) -> list[str]:
    """`count` faults for this kind of database: each once, then kills of what trains and drains,
    then each again.

    Where there are fewer than kinds, they are drawn from all of them.
    """
    possible = [name for name in KINDS if kind == "postgresql" or not name.startswith("postgres")]
    usual = [name for name in possible if name not in ONCE]
    kills = ["kill worker", "kill child", "freeze worker and child"]
    drawn = draw.sample(possible, len(possible))
    while len(drawn) < count:
        drawn += [*kills * 7, *[DRAIN] * 3, *draw.sample(usual, len(usual))]
    drawn = drawn[:count]
    draw.shuffle(drawn)
    return drawn
