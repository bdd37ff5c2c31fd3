"""The pipeline: any schedule, run by one loop over segments of the model."""
