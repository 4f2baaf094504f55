"""The load generator: how a server is loaded, what is measured, and how the figures are shown."""
