"""What others do in the place of what is measured: a tracking server, a row per step, a plain script."""
