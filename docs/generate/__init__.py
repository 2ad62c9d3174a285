"""Pages of docs/reference/, each made from what it is about by a module's `page()`."""

# The modules here that make one.
PAGES = ("flags", "commands", "python", "messages")
