"""What parent and child say survives the pipe; anything else is refused."""

import pytest

from halfstep.worker.protocol import Done, Message, Progress, Ready, RunOrder, StopOrder, decode, encode

MESSAGES: list[Message] = [
    RunOrder(
        job_id="a",
        fence=3,
        attempt=1,
        spec={"name": "ü\n"},
        settings={},
        device="cpu",
        elapsed_seconds=0.5,
        checkpoints=[],
        speeds={"float32": {"matmul": 1.0}},
    ),
    StopOrder(why="drain"),
    Ready(capability={"bf16": True}, components=[], versions={"torch": "2"}),
    Progress(step=1, step_seconds=0.25),
    Done(outcome="failed", step=2, reason={"code": "data_error"}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_is_one_line_and_comes_back_equal(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == message


@pytest.mark.parametrize(
    "line", [b"", b"epoch 1\n", b"{}\n", b'{"kind": "Popen"}\n', b'{"kind": "Progress", "x": 1}\n']
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        decode(line)
