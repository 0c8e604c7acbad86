"""The operators: a folder or a file per op, and the one dispatch between their backends."""
