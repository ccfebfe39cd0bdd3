"""What we know of base models: their anatomy, how to open them, and their weights as matrices."""
