"""Training, and the mesh, models and weights that serving shares."""
