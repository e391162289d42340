"""Files, caches, the machine and its cores, statistics, bounded overlap, spelling suggestions, the terminal."""
