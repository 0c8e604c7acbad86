"""The networks: encoders, decoders, whole systems, and the checkpoints that the authors released."""
