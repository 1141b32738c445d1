"""GRADIENT_SCALING: FP32 throughout; only the loss is scaled and the gradients unscaled."""

from halfstep.worker.amp.policies.interface import PrecisionPolicy


class GradientScalingPolicy(PrecisionPolicy):
    """A full-precision step whose loss carries the scale; powers of two leave its result as it is."""

    def __init__(self, *, scales: bool) -> None:
        self.scales = scales
