"""Data of a run: data sets, the plan of epochs and steps, batches."""
