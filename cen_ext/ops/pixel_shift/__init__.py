"""Shift of channels by a pixel between modalities: definition, compiled op and Triton kernel."""
