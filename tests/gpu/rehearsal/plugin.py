"""A pytest plugin: all tests of this process run on the pretended device, but those for a real one."""

import pytest

from tests.gpu.rehearsal import building

building.load()

from tests.gpu.rehearsal import stand_ins  # noqa: E402  # torch may be imported only now
from tests.gpu.rehearsal.tensors import DEVICE, Rehearsal  # noqa: E402

stand_ins.install()
Rehearsal().__enter__()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and report as deselected, what only a real device can show."""
    real = [item for item in items if item.get_closest_marker("real_device")]
    config.hook.pytest_deselected(items=real)
    items[:] = [item for item in items if item not in real]


@pytest.fixture(autouse=True)
def _a_device_that_nobody_watches() -> None:
    DEVICE.waits.clear()
    DEVICE.sync_debug_mode = "default"
