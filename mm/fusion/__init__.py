"""Bringing modalities together: adapters to one width, embeddings to compare, attention across."""
