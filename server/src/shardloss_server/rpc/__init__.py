"""The gRPC border of the server."""
