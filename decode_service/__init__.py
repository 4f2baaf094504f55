"""The decode tier: its servicer and its scheduling policy. Receives pages and generates by continuous batching."""
