"""The web app: a page with a tab for each ability of a pipeline, its server, and a Hub Space."""
