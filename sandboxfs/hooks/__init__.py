"""OCI hooks: what runs at a container's stages, and how it is registered with a runtime."""
