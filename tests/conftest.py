"""What every test shares: an environment that no developer's own settings leak into."""

import os

import pytest


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests say which settings they use; those of the machine's user are not theirs."""
    for name in list(os.environ):
        if name.startswith("HALFSTEP_") and not name.startswith("HALFSTEP_TEST_"):
            monkeypatch.delenv(name)
