"""Training by a loss of the log probabilities of whole answers: reinforcement, preferences."""
