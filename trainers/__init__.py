"""How modules learn: the commands (fit, evaluate, export), the base task, and one file per method."""
