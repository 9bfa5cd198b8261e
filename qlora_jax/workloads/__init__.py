"""What is trained: the workload protocol, regression and language."""
