"""What to try when a job does not fit, as a sentence made of its own numbers.

Without torch: the worker says it too, of a process that can say nothing any more.
"""

from halfstep.service.contract.spec import JobSpec


def less_memory(spec: JobSpec) -> str:
    """How the same training takes less memory, the cheapest change first."""
    training = spec.training
    remedies = []
    if training.batch_size > 1:
        smaller = training.batch_size // 2
        steps = -(-training.batch_size * training.gradient_accumulation_steps // smaller)
        remedies.append(
            f"batch_size {smaller} with gradient_accumulation_steps {steps}, which trains the same"
        )
    if not spec.precision.activation_checkpointing:
        remedies.append("precision.activation_checkpointing true")
    remedies.append("a smaller model")
    return f"Try {', or '.join(remedies)}."
