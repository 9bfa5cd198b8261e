"""Many devices and processes: the mesh, the sharding of arrays, and the start of processes."""
