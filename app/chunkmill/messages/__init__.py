"""What workers and Flower read from Redis, where anybody may have written: a transport whose messages pass a door."""
