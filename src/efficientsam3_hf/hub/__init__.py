"""Between a model and the Hugging Face Hub."""
