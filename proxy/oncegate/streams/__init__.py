"""What a reader of a running response works with: one response as far as it has come, shared by all who read it."""
