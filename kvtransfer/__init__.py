"""Pages from one worker's memory to another's: the hand-off protocol, and the transports that carry its bytes."""
