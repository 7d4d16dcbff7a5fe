"""The statements of docs/theory.md, each as a function that returns both of its sides."""
