"""The density read backwards: what images say of a column. See docs/infer.md."""
