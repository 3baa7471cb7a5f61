"""What all packages may import: files that are whole or absent, the cache and the hub, the command line."""
