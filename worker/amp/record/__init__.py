"""The step record on its way from the device: the ring, its rows, the step's clock, memory."""
