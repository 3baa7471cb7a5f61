"""What all packages may import: files that are whole or absent, the cache and the hub, the command line."""

__version__ = "0.9.0"
