"""What trained pipelines are good for, and the pictures and the pipeline that are shown and shipped."""
