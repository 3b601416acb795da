"""What can be told of a target once it was probed: whether stock will do, what a search may gain, and what it costs."""
