"""What leaves the machine: the folder, its gates, the push, and the doctor."""
