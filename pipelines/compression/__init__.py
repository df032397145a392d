"""Images as small files: tokens coded under the prior."""
