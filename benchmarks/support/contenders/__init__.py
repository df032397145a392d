"""What is compared at equal bits: tokenizers, their runs, their times, and how they are shown."""
