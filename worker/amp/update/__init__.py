"""What a step changes: weights under the guard, learning rates, the loss scale; and how a skip undoes it."""
