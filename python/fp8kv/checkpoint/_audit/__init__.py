"""Checks of scales that have been read."""
