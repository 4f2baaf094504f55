"""Generated from proto/, committed, and compared with it in CI. Nothing here is written by hand."""
