"""The store: the verbs on one record for each key, and what their replies mean."""
