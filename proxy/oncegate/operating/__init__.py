"""What an operator does with keys and rules, for commands and the page: explain a request, describe a record."""
