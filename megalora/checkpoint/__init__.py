"""Adapter checkpoints: written, found, verified and read on any parallel layout."""
