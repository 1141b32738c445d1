"""What went wrong and where: repetitions of bad steps, layers named, the health of a run, its counters.

Nothing here changes a weight.
"""
