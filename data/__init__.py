"""What the modules learn from: one file per kind of sample."""
