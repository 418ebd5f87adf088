"""Training tasks; one module a task, all behind ``training.task.Task``."""
