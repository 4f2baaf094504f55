"""The whole cluster in one process, under virtual time and seeded faults."""
