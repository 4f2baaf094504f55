"""What the engine gives on a GPU, with random weights of known models' shapes."""
