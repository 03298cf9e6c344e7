"""Models by hand that systems for parallel training were shown with."""
