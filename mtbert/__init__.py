"""Multi-task BERT with sharded gradient surgery."""

__version__ = "0.1.0"
