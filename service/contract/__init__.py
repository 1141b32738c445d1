"""What every process agrees on: frozen models, states, columns. Standard library and pydantic, no I/O."""
