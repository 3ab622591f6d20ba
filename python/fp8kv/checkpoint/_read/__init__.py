"""What a checkpoint holds, read from its files: config, headers, scales."""
