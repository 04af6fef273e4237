"""Put on the path, instead of what a machine lacks."""
