"""Replacements for the linear maps and the feed-forward layers of a Transformer."""
