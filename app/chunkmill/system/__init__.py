"""What Chunkmill takes from the machine and must not trust blindly: files in folders that others made, how Python
starts our programs, and the packages that pip installs. It uses the standard library only."""
