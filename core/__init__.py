"""What every process shares, without torch: requests, sampling parameters, prefix hashes, errors, clock."""
