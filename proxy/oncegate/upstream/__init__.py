"""The API's side of the wire: connections and their pool."""
