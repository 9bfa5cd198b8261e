"""Many devices and processes: the mesh, what is sharded how, and the start of processes."""
