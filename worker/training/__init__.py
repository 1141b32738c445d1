"""Training of one job from its specification: components, data, checkpoints, evaluation and the loop.

Callables and plain objects in, plain objects out: no queue, no SQL, no HTTP and no settings belong here. The
precision of a step is the engine's business (`halfstep.worker.amp`).
"""
