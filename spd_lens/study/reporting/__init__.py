"""From what a study measured to its report."""
