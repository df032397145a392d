"""The verbs beside the five steps, one file each: `smalti VERB`."""
