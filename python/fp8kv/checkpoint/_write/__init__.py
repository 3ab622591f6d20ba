"""A copy of a checkpoint with other scales, and the config that describes them."""
