"""The GPU kernels against their goals, with other libraries beside them."""
