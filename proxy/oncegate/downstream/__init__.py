"""The client's side of the wire: connections, requests, responses, bodies."""
