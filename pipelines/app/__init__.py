"""A pipeline in the browser: a page with a tab for each thing that it can do, its server, and a Hub Space."""
