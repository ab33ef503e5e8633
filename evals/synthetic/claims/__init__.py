"""Claims of papers, each in a file: what is trained, and what counts as holding, fixed before."""
