"""The version, readable without importing torch (setup reads it)."""

__version__ = "0.2.0"
