"""The operators, a folder or a file per op, and the dispatch between their backends."""
