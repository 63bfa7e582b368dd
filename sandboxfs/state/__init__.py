"""What outlives a process of ours, until the next boot: checked directories, locks, the log."""
