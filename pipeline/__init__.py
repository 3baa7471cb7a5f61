"""Where the packages are joined: options, models, checkpoints, predictions."""
