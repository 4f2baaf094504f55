"""Who is alive, and what several routers must count together. A hint store: all of it can be lost."""
