"""How checkpoints hold packed weights: one file per layout."""
