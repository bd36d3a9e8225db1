"""Plain functions for operators: the only thing that the command line and other faces may call."""
