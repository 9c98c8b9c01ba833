"""What is recorded of a training and where: MLflow, its stores, and what a run holds."""
