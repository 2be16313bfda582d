"""The paper's tables and figure from studies, and a study as a page."""
