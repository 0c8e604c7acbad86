"""Experiments that train: questions about the method, not about speed."""
