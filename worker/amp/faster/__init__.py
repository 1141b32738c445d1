"""Ways to make a step cheaper: captured CUDA graphs, torch.compile, activations that are computed again."""
