"""What is installed and built on a machine, for a report of a bug: the command `megalora env`."""
