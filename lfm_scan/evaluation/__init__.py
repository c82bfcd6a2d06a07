"""How well a checkpoint tells real from generated."""
