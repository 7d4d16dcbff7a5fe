"""The statements of docs/explanation/theory.md, each a function that returns both of its sides."""
