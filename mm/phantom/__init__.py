"""Procedural patients with exact truth: images, sounds, record, text."""
