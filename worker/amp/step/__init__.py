"""One optimizer step: micro-batches, gradients, how it ends, what it tells."""
