"""The version of everything that crosses a process, and what changed when.

1.0  the first: router-worker sessions and hand-offs over one session per worker pair
"""

MAJOR = 1
MINOR = 0
