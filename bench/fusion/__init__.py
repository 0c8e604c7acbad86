"""Does exchanging help? Every fusion on the same budget, data and search: ``python -m bench.fusion``."""
