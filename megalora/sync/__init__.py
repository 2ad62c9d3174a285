"""Adapters of a running model handed to a server of inference, without the base."""
