"""Operating-system services: files, caches, hardware, statistics, bounded concurrency, spelling, the terminal."""
