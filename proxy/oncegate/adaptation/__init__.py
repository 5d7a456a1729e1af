"""What one requester gets of a response: the same stored response reads differently for another one. Pure."""
