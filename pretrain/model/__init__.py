"""Language models: their blocks, built from settings and counted without building."""
