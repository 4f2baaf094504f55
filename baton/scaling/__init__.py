"""How many workers each tier should have: pure functions of what the tier shows, with a reason in words."""
