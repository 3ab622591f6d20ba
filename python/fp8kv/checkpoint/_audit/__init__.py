"""What is wrong with scales that have been read."""
