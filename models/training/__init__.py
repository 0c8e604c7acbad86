"""What every training shares: typed configuration, registry, run folder, checkpoints, the loop."""
