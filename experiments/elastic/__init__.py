"""What `experiments.supervise` is made of: decisions, processes, trainers."""
