"""What the page of messages is made of: sentences of the source, and what is written of them."""
