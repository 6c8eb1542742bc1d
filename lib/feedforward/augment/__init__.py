"""New questions from old ones whose answers stay exactly where they can be found."""
