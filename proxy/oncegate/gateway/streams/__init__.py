"""The request path of those who read a response that another request's exchange brings."""
