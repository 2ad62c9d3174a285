"""Exchange with Hugging Face: base weights in and out, adapters out and in, merge, inspect."""
