"""One operation per file for NVIDIA GPUs, in Triton: contract, plain-torch reference, kernels, launcher.

Only this package imports triton, and only what runs on a GPU imports this package.
"""
