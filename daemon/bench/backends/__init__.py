"""The same traces over every backend: made once, measured in a process for each backend, size, trace and round."""
