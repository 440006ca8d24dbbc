"""Scores people can quote: finding agreement, retrieval and VQA, always beside free baselines."""
