"""The version, readable without importing torch (setup reads it)."""

__version__ = "0.1.0"
