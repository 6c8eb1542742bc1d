"""Language models whose feed-forward layers are dense, structured or mixtures of experts."""
