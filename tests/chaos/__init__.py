"""Harm done to real parts: bytes changed on their way, links cut and stopped, workers killed; and what comes of it."""
