"""Speed of training, sampling and quantizers, compared with other libraries."""
