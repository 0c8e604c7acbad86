"""Decoders: an encoder's features to logits."""
