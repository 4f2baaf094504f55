"""How fast pages move between two processes, beside what else could move them: `python -m bench.transfer --help`."""
