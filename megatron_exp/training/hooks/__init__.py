"""What the trainer does besides updating weights: one file for each feature, each using the moments of `base.Hook` it needs."""
