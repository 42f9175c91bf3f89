"""What every package may use and none of the subject knows: files, memory, signals, command lines."""
