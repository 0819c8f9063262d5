"""Pure tensor mathematics: no Ray, no gRPC, no files, no clock, no global random state."""
