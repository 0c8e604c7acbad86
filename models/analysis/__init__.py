"""What trained networks tell of the paper's theory."""
