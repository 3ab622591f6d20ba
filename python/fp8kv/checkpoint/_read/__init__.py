"""Reading a checkpoint's files: config, headers, scales."""
