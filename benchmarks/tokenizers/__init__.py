"""What tokenizers keep of images, and how they are trained to."""
