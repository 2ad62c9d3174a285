"""The documentation; `make docs` makes a site of it."""
