"""Unknown keys that settle by what the API says of them."""
