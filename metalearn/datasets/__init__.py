"""Sources of few-shot tasks."""
