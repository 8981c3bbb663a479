"""Lines and samples of a run for TensorBoard and MLflow."""
