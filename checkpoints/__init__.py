"""What is kept of a training: the adapter folder, its manifest, and how it is written, read and refused."""
