"""Small tasks with known answers that measure, by training on them, what a layer can express."""
