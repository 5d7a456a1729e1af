"""The settings: the variables of the environment, their types, and the checks between them."""
