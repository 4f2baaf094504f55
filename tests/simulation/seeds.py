"""Seeds that failed once: each is a test for ever. A seed means another schedule when what is drawn from it changes,
so a failure that matters also has a test of its own beside the code that it was found in.
"""

FAILED_ONCE: tuple[int, ...] = ()
