"""The gRPC layer of the server."""
