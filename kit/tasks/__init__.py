"""What differs between the tasks, one file each."""
