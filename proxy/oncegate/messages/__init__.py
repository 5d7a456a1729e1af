"""Rules about HTTP messages: heads, fields, targets, problems. Pure."""
