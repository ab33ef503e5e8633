"""A page on this machine that follows runs and grids as they train, from their files alone."""
