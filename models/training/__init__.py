"""The parts that all training shares: typed configuration, registry, run folder, checkpoints, the loop."""
