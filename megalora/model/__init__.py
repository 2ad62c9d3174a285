"""What a model is: its sizes, its family's row in one table, and the reading of its config.json.

Nothing here needs torch or Megatron.
"""
