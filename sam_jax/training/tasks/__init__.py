"""What a run can train; one module a task, all behind ``training.task.Task``."""
