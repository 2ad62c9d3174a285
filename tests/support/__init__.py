"""What tests share: models, data and ranks to start from, and what stands in for a GPU."""
