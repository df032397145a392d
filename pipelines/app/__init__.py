"""A pipeline in the browser: a page with a tab for each thing that it can do, served with bounds; and a Hub Space."""
