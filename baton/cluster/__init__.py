"""Baton on Ray: what a cluster file says, what Ray Serve makes of it, and how a tier's size is decided there."""
