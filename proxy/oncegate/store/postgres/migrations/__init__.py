"""The schema: numbered files of SQL, what brings a database to the newest of them, and the partitions of each day."""
