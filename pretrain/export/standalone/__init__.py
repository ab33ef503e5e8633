"""Text of the files that an exported model is made of."""
