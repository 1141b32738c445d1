"""The device that a run uses: what it can do, how fast it is, how it is made ready, what decides its bits."""
