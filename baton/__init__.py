"""The front door of Baton: the command line, the launcher, and what a Python program imports."""

__version__ = "0.1.0"
