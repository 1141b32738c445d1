"""A pretended CUDA device: tensors that say `cuda:0` and compute on the CPU.

Code for CUDA is rehearsed on it where there is none: `python -m pytest -p tests.gpu.rehearsal.plugin …` runs
tests on it. It cannot pretend graphs, real kernels or real time; tests of these are marked `real_device`.
"""
