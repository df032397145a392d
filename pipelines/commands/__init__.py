"""The verbs other than the five steps, one file each: `smalti VERB`."""
