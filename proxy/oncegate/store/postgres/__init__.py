"""The store in PostgreSQL: the verbs of a record as functions of the database, each called in one statement."""
