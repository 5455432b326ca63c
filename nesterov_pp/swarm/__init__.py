"""A swarm: stages that are groups of workers which come and go, and pass each other microbatches over TCP."""
