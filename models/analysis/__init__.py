"""What trained networks tell of the paper's theory, and what their channels show."""
