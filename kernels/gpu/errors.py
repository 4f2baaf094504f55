"""What Triton raises when a kernel does not compile, or does not fit the chip."""

from triton import TritonError

KERNEL_ERRORS = (TritonError,)
