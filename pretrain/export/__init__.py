"""Exchange with other libraries: Hugging Face models and tokenizers."""
