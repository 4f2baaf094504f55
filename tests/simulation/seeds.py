"""Seeds that failed once: each is a test for ever. A seed means another schedule when what is drawn from it changes,
so a failure that matters also has a test of its own beside the code that it was found in.
"""

FAILED_ONCE: tuple[int, ...] = (
    5,  # a request whose last token came from prefill had no receipt
    26,  # a receipt was lost with its session
    51,  # a request killed three workers
    119,  # a receipt of a second turn was lost
    176,  # an offer outlived its worker
)
