"""One training run: its flags, its rates and its outputs."""
