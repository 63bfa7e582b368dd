"""The runtime in front of the runtime: `create`, `run` and `restore` get our root."""
