"""Whole networks that are not an encoder with a decoder."""
