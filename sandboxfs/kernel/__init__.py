"""How Linux is asked: thin wrappers named after the system calls.  Knows nothing of OCI."""
