"""Own the run folder, the processes, paths, progress bars and hardware of a run."""
