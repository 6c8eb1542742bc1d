"""Extractive question answering: data, readers with experts, and what they are measured by."""
